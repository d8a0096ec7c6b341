"""diffusers/schedulers/scheduling_lcm.py."""

from __future__ import annotations

from derivation.config import SchedulerConfig
from derivation.errors import DerivationError
from derivation.tape.tensor import SymTensor
from derivation.walk.schedulers.arithmetic import Value, on_device
from derivation.walk.schedulers.base import AlphasCumprod, register
from derivation.walk.schedulers.thresholding import threshold_sample


class Distilled(AlphasCumprod):
    """What LCM and TCD share: timesteps out of those of the distillation."""

    prediction_types = ("epsilon", "sample", "v_prediction")

    def __init__(self, config: SchedulerConfig, num_inference_steps: int) -> None:
        super().__init__(config, num_inference_steps)
        self.check_steps()

    def check_steps(self, strength: float = 1.0) -> None:
        """Raise DerivationError where the first ``strength`` of the original steps are fewer than the steps."""
        original_steps = self.config.options["original_inference_steps"]
        assert isinstance(original_steps, int)
        if self.num_inference_steps > int(original_steps * strength):
            part = "" if strength == 1.0 else f" x strength = {strength}"
            raise DerivationError(
                f"num_inference_steps = {self.num_inference_steps} is above original_inference_steps = "
                f"{original_steps}{part} of {self.config.class_name}"
            )

    def schedule(self) -> list[int]:
        original = self.config.options["original_inference_steps"]
        assert isinstance(original, int)
        steps, k = self.num_inference_steps, self.config.num_train_timesteps // original
        return [(original - original * i // steps) * k - 1 for i in range(steps)]


@register
class LCMScheduler(Distilled):
    """Latent consistency models: fresh noise at every step but the last."""

    def step_with_denoised(self, model_output: SymTensor, sample: SymTensor) -> tuple[SymTensor, SymTensor]:
        """Return the previous sample and the denoised one, the same in the last step."""
        prev_sample, denoised = self.previous_and_denoised(Value(model_output), Value(sample))
        self.step_index += 1
        return prev_sample, denoised

    def previous(self, model_output: Value, sample: Value) -> Value:
        return self.previous_and_denoised(model_output, sample)[0]

    def previous_and_denoised(self, model_output: Value, sample: Value) -> tuple[Value, Value]:
        """Compute what ``step()`` returns."""
        timestep = self.timesteps[self.step_index]
        prev_timestep = timestep if self.last else self.timesteps[self.step_index + 1]

        alpha_prod_t = self.alpha_prod(timestep)
        alpha_prod_t_prev = self.alpha_prod(prev_timestep)

        beta_prod_t = 1 - alpha_prod_t
        beta_prod_t_prev = 1 - alpha_prod_t_prev

        if self.config.prediction_type == "epsilon":
            predicted_original_sample = (sample - beta_prod_t.apply("sqrt") * model_output) / alpha_prod_t.apply("sqrt")
        elif self.config.prediction_type == "sample":
            predicted_original_sample = model_output
        else:
            predicted_original_sample = alpha_prod_t.apply("sqrt") * sample - beta_prod_t.apply("sqrt") * model_output

        if self.config.thresholding:
            predicted_original_sample = threshold_sample(predicted_original_sample)
        elif self.config.clip_sample:
            predicted_original_sample = predicted_original_sample.apply("clamp")

        # c_out and c_skip are scalars on the CPU, as the timestep is
        denoised = 1.0 * predicted_original_sample + 1.0 * sample

        if not self.last:
            noise = on_device(model_output.shape, denoised.dtype, "randn")
            prev_sample = alpha_prod_t_prev.apply("sqrt") * denoised + beta_prod_t_prev.apply("sqrt") * noise
        else:
            prev_sample = denoised
        return prev_sample, denoised
