"""diffusers/schedulers/scheduling_ddpm.py."""

from __future__ import annotations

from derivation.config import SchedulerConfig
from derivation.walk.schedulers.arithmetic import Value, on_device
from derivation.walk.schedulers.base import AlphasCumprod, register
from derivation.walk.schedulers.thresholding import threshold_sample


@register
class DDPMScheduler(AlphasCumprod):
    """Denoising diffusion probabilistic models: fresh noise at every step but that of timestep 0."""

    prediction_types = ("epsilon", "sample", "v_prediction")

    def __init__(self, config: SchedulerConfig, num_inference_steps: int) -> None:
        super().__init__(config, num_inference_steps)
        self.expect("variance_type", "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")

    def previous(self, model_output: Value, sample: Value) -> Value:
        alpha_prod_t = self.alphas_cumprod.entry()
        alpha_prod_t_prev = self.alpha_prod_prev()
        beta_prod_t = 1 - alpha_prod_t
        beta_prod_t_prev = 1 - alpha_prod_t_prev
        current_alpha_t = alpha_prod_t / alpha_prod_t_prev
        current_beta_t = 1 - current_alpha_t

        if self.config.prediction_type == "epsilon":
            pred_original_sample = (sample - beta_prod_t ** (0.5) * model_output) / alpha_prod_t ** (0.5)
        elif self.config.prediction_type == "sample":
            pred_original_sample = model_output
        else:
            pred_original_sample = (alpha_prod_t**0.5) * sample - (beta_prod_t**0.5) * model_output

        if self.config.thresholding:
            pred_original_sample = threshold_sample(pred_original_sample)
        elif self.config.clip_sample:
            pred_original_sample = pred_original_sample.apply("clamp")

        pred_original_sample_coeff = (alpha_prod_t_prev ** (0.5) * current_beta_t) / beta_prod_t
        current_sample_coeff = current_alpha_t ** (0.5) * beta_prod_t_prev / beta_prod_t

        pred_prev_sample = pred_original_sample_coeff * pred_original_sample + current_sample_coeff * sample

        if self.timesteps[self.step_index] > 0:
            variance_noise = on_device(model_output.shape, model_output.dtype, "randn")
            variance = self.deviation() * variance_noise
            pred_prev_sample = pred_prev_sample + variance
        else:
            pred_prev_sample = pred_prev_sample + 0
        return pred_prev_sample

    def alpha_prod_prev(self) -> Value:
        """``alphas_cumprod[prev_t]``, or ``one``, which stays on the CPU, after the last timestep."""
        return self.final_alpha_cumprod if self.last else self.alphas_cumprod.entry()

    def deviation(self) -> Value:
        """What the noise is multiplied by: ``_get_variance`` or its root."""
        log = self.config.options["variance_type"] == "fixed_small_log"
        return self._get_variance() if log else self._get_variance() ** 0.5

    def _get_variance(self) -> Value:
        alpha_prod_t = self.alphas_cumprod.entry()
        alpha_prod_t_prev = self.alpha_prod_prev()
        current_beta_t = 1 - alpha_prod_t / alpha_prod_t_prev

        variance = (1 - alpha_prod_t_prev) / (1 - alpha_prod_t) * current_beta_t
        variance = variance.apply("clamp")
        variance_type = self.config.options["variance_type"]
        if variance_type == "fixed_small_log":
            variance = variance.apply("log")
            variance = (0.5 * variance).apply("exp")
        elif variance_type == "fixed_large":
            variance = current_beta_t
        elif variance_type == "fixed_large_log":
            variance = current_beta_t.apply("log")
        return variance
