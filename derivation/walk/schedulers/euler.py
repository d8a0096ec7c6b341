"""diffusers/schedulers/scheduling_euler_discrete.py and scheduling_euler_ancestral_discrete.py."""

from __future__ import annotations

from derivation.tape.tape import tape
from derivation.tape.tensor import SymTensor
from derivation.walk.schedulers.arithmetic import Value, on_device
from derivation.walk.schedulers.base import RESPACED, Sigmas, register


class Euler(Sigmas):
    """What both share: float32 timesteps, a scaled UNet input, float32 inside a step."""

    timestep_dtype = "float32"

    def scale_model_input(self, sample: SymTensor) -> SymTensor:
        sigma = self.sigmas.entry()
        sample = Value(sample) / ((sigma**2 + 1) ** 0.5)
        return sample

    def noised(self, original_samples: Value, noise: Value, sigma: Value) -> Value:
        noisy_samples = original_samples + noise * sigma
        return noisy_samples

    def pred_original_sample(self, model_output: Value, sample: Value, sigma: Value) -> Value:
        """Compute the predicted x_0."""
        if self.config.prediction_type == "epsilon":
            return sample - sigma * model_output
        if self.config.prediction_type == "sample":
            return model_output
        return model_output * (-sigma / (sigma**2 + 1) ** 0.5) + (sample / (sigma**2 + 1))


@register
class EulerDiscreteScheduler(Euler):
    """Euler's method (s_churn = 0)."""

    prediction_types = ("epsilon", "sample", "v_prediction")

    @property
    def log_linear(self) -> bool:
        """Whether steps + 1 sigmas are spaced evenly by their logarithms."""
        respaced = any(self.config.options.get(key) for key in RESPACED)
        return self.config.options["interpolation_type"] == "log_linear" and not respaced

    @property
    def num_timesteps(self) -> int:
        continuous = self.config.options["timestep_type"] == "continuous"
        if self.log_linear and continuous and self.config.prediction_type == "v_prediction":
            return self.num_inference_steps + 1
        return super().num_timesteps

    @property
    def num_sigmas(self) -> int:
        return self.num_inference_steps + 2 if self.log_linear else super().num_sigmas

    def previous(self, model_output: Value, sample: Value) -> Value:
        sample = sample.to("float32")
        sigma_hat = self.sigmas.entry()
        if tape().libraries.follows("euler_draws_noise"):
            noise = on_device(model_output.shape, model_output.dtype, "randn")
            eps = noise * 1.0

        pred_original_sample = self.pred_original_sample(model_output, sample, sigma_hat)

        derivative = (sample - pred_original_sample) / sigma_hat
        dt = self.sigmas.entry() - sigma_hat
        prev_sample = sample + derivative * dt

        prev_sample = prev_sample.to(model_output.dtype)
        return prev_sample


@register
class EulerAncestralDiscreteScheduler(Euler):
    """Euler's method with fresh noise at every step."""

    def previous(self, model_output: Value, sample: Value) -> Value:
        sigma = self.sigmas.entry()
        sample = sample.to("float32")

        pred_original_sample = self.pred_original_sample(model_output, sample, sigma)

        derivative = (sample - pred_original_sample) / sigma
        dt = self.sigmas.entry() - sigma
        prev_sample = sample + derivative * dt

        noise = on_device(model_output.shape, model_output.dtype, "randn")
        prev_sample = prev_sample + noise * sigma

        prev_sample = prev_sample.to(model_output.dtype)
        return prev_sample
