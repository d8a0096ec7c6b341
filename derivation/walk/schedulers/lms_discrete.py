"""diffusers/schedulers/scheduling_lms_discrete.py."""

from __future__ import annotations

from derivation.config import SchedulerConfig
from derivation.walk.schedulers.arithmetic import Value
from derivation.walk.schedulers.base import register
from derivation.walk.schedulers.euler import Euler

# step: order
ORDER = 4


@register
class LMSDiscreteScheduler(Euler):
    """Linear multistep: the last four derivatives stay alive; every coefficient is a number."""

    prediction_types = ("epsilon", "sample", "v_prediction")
    warmup = ORDER

    def __init__(self, config: SchedulerConfig, num_inference_steps: int) -> None:
        super().__init__(config, num_inference_steps)
        self.derivatives: list[Value] = []

    def previous(self, model_output: Value, sample: Value) -> Value:
        sigma = self.sigmas.entry()
        pred_original_sample = self.pred_original_sample(model_output, sample, sigma)

        derivative = (sample - pred_original_sample) / sigma
        self.derivatives.append(derivative)
        if len(self.derivatives) > ORDER:
            self.derivatives.pop(0)

        prev_sample = sample + self.summed()
        return prev_sample

    def summed(self) -> Value:
        """``sum(coeff * derivative for ...)``, which begins with 0."""
        newest, *others = reversed(self.derivatives)
        total = 0 + newest * 1.0
        for derivative in others:
            total = total + derivative * 1.0
        return total
