"""diffusers/schedulers/scheduling_dpmsolver_multistep.py."""

from __future__ import annotations

import math

from derivation.config import SchedulerConfig
from derivation.walk.schedulers.arithmetic import Value, on_device
from derivation.walk.schedulers.base import register
from derivation.walk.schedulers.multistep import Multistep
from derivation.walk.schedulers.thresholding import threshold_sample

# Below this many timesteps lower_order_final takes effect.
FEW_STEPS = 15


class DPMSolver(Multistep):
    """DPM-Solver, DPM-Solver++ and their SDE variants: which order a step has, and the formulas of each."""

    tail = 2

    def __init__(self, config: SchedulerConfig, num_inference_steps: int) -> None:
        super().__init__(config, num_inference_steps)
        self.predicts_noise = config.algorithm_type in ("dpmsolver", "sde-dpmsolver")
        self.check()
        self.warmup = self.solver_order + 1
        self.stochastic = config.algorithm_type in ("sde-dpmsolver", "sde-dpmsolver++")

    def check(self) -> None:
        """Raise DerivationError for what diffusers has no formula for, and for the learned variances of pixels."""
        self.expect("variance_type", None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")
        if self.config.algorithm_type not in ("dpmsolver++", "sde-dpmsolver++"):
            self.expect("final_sigmas_type", "sigma_min")
        if self.predicts_noise:
            self.expect("prediction_type", "epsilon", "sample", "v_prediction")
        if self.config.algorithm_type == "sde-dpmsolver":
            self.expect("solver_order", 1, 2)
        if self.config.timestep_spacing == "trailing":
            # the timesteps begin below a noise level that the betas decide
            self.expect("lambda_min_clipped", -math.inf)

    @property
    def order_now(self) -> int:
        """The order of the step to come."""
        few = self.config.lower_order_final and self.num_timesteps < FEW_STEPS
        to_zero = self.config.options["final_sigmas_type"] == "zero"
        if self.last and (self.config.euler_at_final or few or to_zero):
            return 1
        limit = 2 if few and self.step_index == self.num_timesteps - 2 else self.solver_order
        return min(self.solver_order, self.lower_order_nums + 1, limit)

    def previous(self, model_output: Value, sample: Value) -> Value:
        model_output = self.convert_model_output(model_output, sample)
        self.keep(model_output)

        sample = sample.to("float32")
        noise = on_device(model_output.shape, "float32", "randn") if self.stochastic else None

        prev_sample = (self.first_order, self.second_order, self.third_order)[self.order_now - 1](sample, noise)
        if self.lower_order_nums < self.solver_order:
            self.lower_order_nums += 1

        prev_sample = prev_sample.to(model_output.dtype)
        return prev_sample

    def convert_model_output(self, model_output: Value, sample: Value) -> Value:
        """Compute the predicted x_0, or the predicted noise for DPM-Solver."""
        convert = self.convert_to_epsilon if self.predicts_noise else self.predicted_x0
        return convert(model_output, sample)

    def convert_to_epsilon(self, model_output: Value, sample: Value) -> Value:
        """Compute the predicted noise."""
        alpha_t, sigma_t = self.sigma_to_alpha_sigma_t(self.sigmas.entry())
        if self.config.prediction_type == "epsilon":
            epsilon = model_output
        elif self.config.prediction_type == "sample":
            epsilon = (sample - alpha_t * model_output) / sigma_t
        else:
            epsilon = alpha_t * model_output + sigma_t * sample
        if self.config.thresholding:
            x0_pred = (sample - sigma_t * epsilon) / alpha_t
            x0_pred = threshold_sample(x0_pred)
            epsilon = (sample - alpha_t * x0_pred) / sigma_t
        return epsilon

    def first_order(self, sample: Value, noise: Value | None) -> Value:
        """``dpm_solver_first_order_update``; every coefficient ``c`` is a scalar on the CPU."""
        c = self.sigmas.entry()
        model_output = self.outputs()[0]
        if noise is not None:
            return c * sample + c * model_output + c * noise
        return c * sample - c * model_output

    def second_order(self, sample: Value, noise: Value | None) -> Value:
        """``multistep_dpm_solver_second_order_update``; midpoint and heun differ in signs and coefficients."""
        c = self.sigmas.entry()
        m0, m1 = self.outputs()[:2]
        D0, D1 = m0, c * (m0 - m1)
        if noise is not None:
            return c * sample + c * D0 + c * D1 + c * noise
        return c * sample - c * D0 + c * D1

    def third_order(self, sample: Value, noise: Value | None) -> Value:
        """``multistep_dpm_solver_third_order_update``."""
        c = self.sigmas.entry()
        m0, m1, m2 = self.outputs()
        D0 = m0
        D1_0, D1_1 = c * (m0 - m1), c * (m1 - m2)
        D1 = D1_0 + c * (D1_0 - D1_1)
        D2 = c * (D1_0 - D1_1)
        if noise is not None:
            return c * sample + c * D0 + c * D1 + c * D2 + c * noise
        return c * sample - c * D0 + c * D1 - c * D2


@register
class DPMSolverMultistepScheduler(DPMSolver):
    """All of them on a diffusion of alphas, float32 inside a step."""
