"""What DPMSolverMultistepScheduler and UniPCMultistepScheduler have alike."""

from __future__ import annotations

from derivation.config import SchedulerConfig
from derivation.walk.schedulers.arithmetic import Value
from derivation.walk.schedulers.base import Sigmas
from derivation.walk.schedulers.thresholding import threshold_sample


class Multistep(Sigmas):
    """The last ``solver_order`` model outputs stay alive."""

    prediction_types: tuple[str, ...] = ("epsilon", "sample", "v_prediction", "flow_prediction")

    def __init__(self, config: SchedulerConfig, num_inference_steps: int) -> None:
        super().__init__(config, num_inference_steps)
        assert config.solver_order is not None
        self.solver_order = config.solver_order
        self.model_outputs: list[Value | None] = [None] * self.solver_order
        self.lower_order_nums = 0

    def keep(self, model_output: Value) -> None:
        """Add a model output, the oldest one leaves."""
        for i in range(self.solver_order - 1):
            self.model_outputs[i] = self.model_outputs[i + 1]
        self.model_outputs[-1] = model_output

    def outputs(self) -> tuple[Value, ...]:
        """Return the model outputs, newest first."""
        return tuple(output for output in reversed(self.model_outputs) if output is not None)

    def predicted_x0(self, model_output: Value, sample: Value) -> Value:
        """``convert_model_output`` where it gives the predicted x_0."""
        alpha_t, sigma_t = self.sigma_to_alpha_sigma_t(self.sigmas.entry())
        if self.config.prediction_type == "epsilon":
            x0_pred = (sample - sigma_t * model_output) / alpha_t
        elif self.config.prediction_type == "sample":
            x0_pred = model_output
        elif self.config.prediction_type == "v_prediction":
            x0_pred = alpha_t * sample - sigma_t * model_output
        else:
            x0_pred = sample - sigma_t * model_output
        if self.config.thresholding:
            x0_pred = threshold_sample(x0_pred)
        return x0_pred

    def noised(self, original_samples: Value, noise: Value, sigma: Value) -> Value:
        alpha_t, sigma_t = self.sigma_to_alpha_sigma_t(sigma)
        noisy_samples = alpha_t * original_samples + sigma_t * noise
        return noisy_samples

    def sigma_to_alpha_sigma_t(self, sigma: Value) -> tuple[Value, Value]:
        """``_sigma_to_alpha_sigma_t``."""
        if self.config.options.get("use_flow_sigmas"):
            alpha_t = 1 - sigma
            sigma_t = sigma
        else:
            alpha_t = 1 / ((sigma**2 + 1) ** 0.5)
            sigma_t = sigma * alpha_t
        return alpha_t, sigma_t
