"""diffusers/schedulers/scheduling_tcd.py."""

from __future__ import annotations

from derivation.walk.schedulers.arithmetic import Value
from derivation.walk.schedulers.base import register
from derivation.walk.schedulers.lcm import Distilled


@register
class TCDScheduler(Distilled):
    """Trajectory consistency distillation with the pipelines' eta = 0: no noise, nothing kept across steps."""

    def previous(self, model_output: Value, sample: Value) -> Value:
        alpha_prod_t = self.alphas_cumprod.entry()
        beta_prod_t = 1 - alpha_prod_t

        alpha_prod_s = self.alphas_cumprod.entry()
        beta_prod_s = 1 - alpha_prod_s

        if self.config.prediction_type == "epsilon":
            pred_original_sample = (sample - beta_prod_t.apply("sqrt") * model_output) / alpha_prod_t.apply("sqrt")
            pred_epsilon = model_output
        elif self.config.prediction_type == "sample":
            pred_original_sample = model_output
            pred_epsilon = (sample - alpha_prod_t ** (0.5) * pred_original_sample) / beta_prod_t ** (0.5)
        else:
            pred_original_sample = (alpha_prod_t**0.5) * sample - (beta_prod_t**0.5) * model_output
            pred_epsilon = (alpha_prod_t**0.5) * model_output + (beta_prod_t**0.5) * sample

        return alpha_prod_s.apply("sqrt") * pred_original_sample + beta_prod_s.apply("sqrt") * pred_epsilon
