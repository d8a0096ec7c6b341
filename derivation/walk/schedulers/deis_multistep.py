"""diffusers/schedulers/scheduling_deis_multistep.py."""

from __future__ import annotations

from derivation.config import SchedulerConfig
from derivation.walk.schedulers.arithmetic import Value
from derivation.walk.schedulers.base import register
from derivation.walk.schedulers.dpmsolver_multistep import FEW_STEPS
from derivation.walk.schedulers.multistep import Multistep


@register
class DEISMultistepScheduler(Multistep):
    """Exponential integrator in log-rho; every coefficient ``c`` is a scalar on the CPU."""

    tail = 2

    def __init__(self, config: SchedulerConfig, num_inference_steps: int) -> None:
        super().__init__(config, num_inference_steps)
        self.warmup = self.solver_order + 1

    @property
    def order_now(self) -> int:
        """The order of the step to come."""
        few = self.config.lower_order_final and self.num_timesteps < FEW_STEPS
        limit = self.num_timesteps - self.step_index if few else self.solver_order
        return min(self.solver_order, self.lower_order_nums + 1, limit)

    def previous(self, model_output: Value, sample: Value) -> Value:
        model_output = self.convert_model_output(model_output, sample)
        self.keep(model_output)

        if self.order_now == 1:
            prev_sample = self.first_order(model_output, sample)
        else:
            prev_sample = self.higher_order(self.order_now, sample)
        if self.lower_order_nums < self.solver_order:
            self.lower_order_nums += 1
        return prev_sample

    def convert_model_output(self, model_output: Value, sample: Value) -> Value:
        """Compute the predicted noise of the predicted x_0."""
        c = self.sigmas.entry()
        x0_pred = self.predicted_x0(model_output, sample)
        return (sample - c * x0_pred) / c

    def first_order(self, model_output: Value, sample: Value) -> Value:
        """``deis_first_order_update``."""
        c = self.sigmas.entry()
        return c * sample - c * model_output

    def higher_order(self, order: int, sample: Value) -> Value:
        """``multistep_deis_second_order_update`` and the third's."""
        c = self.sigmas.entry()
        x_t = sample / c
        for m in self.outputs()[:order]:
            x_t = x_t + c * m
        return c * x_t
