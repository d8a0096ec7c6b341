"""diffusers/schedulers: scheduling_heun_discrete.py, and what both k_dpm_2 schedulers share with it."""

from __future__ import annotations

from derivation.config import SchedulerConfig
from derivation.walk.schedulers.arithmetic import Value
from derivation.walk.schedulers.base import register
from derivation.walk.schedulers.euler import Euler


class SecondOrder(Euler):
    """Two UNet calls a step, one for the last; between them the sample of the first stays alive."""

    order = 2

    def __init__(self, config: SchedulerConfig, num_inference_steps: int) -> None:
        super().__init__(config, num_inference_steps)
        self.sample: Value | None = None

    @property
    def num_timesteps(self) -> int:
        return 2 * super().num_timesteps - 1


@register
class HeunDiscreteScheduler(SecondOrder):
    """Heun's method: the derivative at both ends of a step, averaged."""

    prediction_types = ("epsilon", "sample", "v_prediction")

    def __init__(self, config: SchedulerConfig, num_inference_steps: int) -> None:
        super().__init__(config, num_inference_steps)
        self.prev_derivative: Value | None = None

    def previous(self, model_output: Value, sample: Value) -> Value:
        sigma = self.sigmas.entry()
        pred_original_sample = self.pred_original_sample(model_output, sample, sigma)
        if self.config.clip_sample:
            pred_original_sample = pred_original_sample.apply("clamp")

        derivative = (sample - pred_original_sample) / sigma
        if self.prev_derivative is None or self.sample is None:
            self.prev_derivative = derivative
            self.sample = sample
        else:
            derivative = (self.prev_derivative + derivative) / 2
            sample = self.sample
            self.prev_derivative = None
            self.sample = None

        prev_sample = sample + derivative * sigma
        return prev_sample
