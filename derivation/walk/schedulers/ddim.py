"""diffusers/schedulers/scheduling_ddim.py."""

from __future__ import annotations

from derivation.walk.schedulers.arithmetic import Value
from derivation.walk.schedulers.base import AlphasCumprod, register
from derivation.walk.schedulers.thresholding import threshold_sample


@register
class DDIMScheduler(AlphasCumprod):
    """Denoising diffusion implicit models with eta = 0: keeps nothing across steps."""

    prediction_types = ("epsilon", "sample", "v_prediction")

    def previous(self, model_output: Value, sample: Value) -> Value:
        timestep = self.timesteps[self.step_index]
        prev_timestep = self.prev_timestep(timestep)

        alpha_prod_t = self.alpha_prod(timestep)
        alpha_prod_t_prev = self.alpha_prod(prev_timestep)

        beta_prod_t = 1 - alpha_prod_t

        if self.config.prediction_type == "epsilon":
            pred_original_sample = (sample - beta_prod_t ** (0.5) * model_output) / alpha_prod_t ** (0.5)
            pred_epsilon = model_output
        elif self.config.prediction_type == "sample":
            pred_original_sample = model_output
            pred_epsilon = (sample - alpha_prod_t ** (0.5) * pred_original_sample) / beta_prod_t ** (0.5)
        else:
            pred_original_sample = (alpha_prod_t**0.5) * sample - (beta_prod_t**0.5) * model_output
            pred_epsilon = (alpha_prod_t**0.5) * model_output + (beta_prod_t**0.5) * sample

        if self.config.thresholding:
            pred_original_sample = threshold_sample(pred_original_sample)
        elif self.config.clip_sample:
            pred_original_sample = pred_original_sample.apply("clamp")

        variance = self._get_variance(timestep, prev_timestep)
        std_dev_t = 0.0 * variance ** (0.5)

        pred_sample_direction = (1 - alpha_prod_t_prev - std_dev_t**2) ** (0.5) * pred_epsilon

        prev_sample = alpha_prod_t_prev ** (0.5) * pred_original_sample + pred_sample_direction
        return prev_sample

    def _get_variance(self, timestep: int, prev_timestep: int) -> Value:
        alpha_prod_t = self.alpha_prod(timestep)
        alpha_prod_t_prev = self.alpha_prod(prev_timestep)
        beta_prod_t = 1 - alpha_prod_t
        beta_prod_t_prev = 1 - alpha_prod_t_prev

        variance = (beta_prod_t_prev / beta_prod_t) * (1 - alpha_prod_t / alpha_prod_t_prev)
        return variance
