"""diffusers/schedulers/scheduling_unipc_multistep.py."""

from __future__ import annotations

from collections.abc import Sequence

from derivation.config import SchedulerConfig
from derivation.tape.events import Category
from derivation.tape.symbols import Size
from derivation.walk.ops import bmm, reshape
from derivation.walk.schedulers.arithmetic import Value, on_cpu, on_device
from derivation.walk.schedulers.base import register
from derivation.walk.schedulers.multistep import Multistep


@register
class UniPCMultistepScheduler(Multistep):
    """UniPC: the last sample stays alive too; sigmas go to the device."""

    def __init__(self, config: SchedulerConfig, num_inference_steps: int) -> None:
        super().__init__(config, num_inference_steps)
        if not config.predict_x0:
            self.expect("prediction_type", "epsilon", "sample", "v_prediction")
        self.tail = self.solver_order
        disabled = config.options["disable_corrector"]
        assert isinstance(disabled, tuple)
        self.disable_corrector = disabled
        self.warmup = max([self.solver_order + 1, *(int(step) + 2 for step in disabled)])
        self.this_order = 0
        self.last_sample: Value | None = None

    def previous(self, model_output: Value, sample: Value) -> Value:
        use_corrector = self.step_index - 1 not in self.disable_corrector and self.last_sample is not None

        model_output_convert = self.convert_model_output(model_output, sample)
        if use_corrector:
            sample = self.multistep_uni_c_bh_update(model_output_convert, self.this_order)

        self.keep(model_output_convert)

        this_order = self.solver_order
        if self.config.lower_order_final:
            this_order = min(this_order, self.num_timesteps - self.step_index)
        self.this_order = min(this_order, self.lower_order_nums + 1)

        self.last_sample = sample
        prev_sample = self.multistep_uni_p_bh_update(sample, self.this_order)
        if self.lower_order_nums < self.solver_order:
            self.lower_order_nums += 1
        return prev_sample

    def convert_model_output(self, model_output: Value, sample: Value) -> Value:
        """Compute the predicted x_0 (``predict_x0``), else the predicted noise."""
        if self.config.predict_x0:
            return self.predicted_x0(model_output, sample)
        alpha_t, sigma_t = self.sigma_to_alpha_sigma_t(self.sigmas.entry())
        if self.config.prediction_type == "epsilon":
            return model_output
        if self.config.prediction_type == "sample":
            return (sample - alpha_t * model_output) / sigma_t
        return alpha_t * model_output + sigma_t * sample

    def multistep_uni_p_bh_update(self, x: Value, order: int) -> Value:
        """Predict the next sample."""
        m0 = self.outputs()[0]
        frame = Frame(self, order)

        pred_res: Value | float = 0
        if frame.differences:
            frame.stack_differences()
            rhos_p = half(x.dtype) if order == 2 else solve(order - 1).to(x.dtype)

        x_t_ = frame.ratio * x - frame.scale * frame.h_phi_1 * m0
        if frame.D1s is not None:
            pred_res = weighted_sum(rhos_p, frame.D1s)
        x_t = x_t_ - frame.scale * frame.B_h * pred_res
        x_t = x_t.to(x.dtype)
        return x_t

    def multistep_uni_c_bh_update(self, model_t: Value, order: int) -> Value:
        """Correct the last prediction; ``order`` is the last step's."""
        m0, x = self.outputs()[0], self.last_sample
        assert x is not None
        frame = Frame(self, order)

        corr_res: Value | float = 0
        if frame.differences:
            frame.stack_differences()
        rhos_c = half(x.dtype) if order == 1 else solve(order).to(x.dtype)

        x_t_ = frame.ratio * x - frame.scale * frame.h_phi_1 * m0
        if frame.D1s is not None:
            corr_res = weighted_sum(rhos_c, frame.D1s)
        D1_t = model_t - m0
        x_t = x_t_ - frame.scale * frame.B_h * (corr_res + rhos_c.entry() * D1_t)
        x_t = x_t.to(x.dtype)
        return x_t


class Frame:
    """The local variables of both updates' common first part: scalars on the device, and D1s."""

    def __init__(self, scheduler: UniPCMultistepScheduler, order: int) -> None:
        self.predict_x0 = scheduler.config.predict_x0
        sigma = scheduler.sigmas.entry()
        self.sigma_t, self.sigma_s0 = sigma.to_device(), sigma.to_device()
        self.alpha_t, self.sigma_t = scheduler.sigma_to_alpha_sigma_t(self.sigma_t)
        self.alpha_s0, self.sigma_s0 = scheduler.sigma_to_alpha_sigma_t(self.sigma_s0)

        self.lambda_t = self.alpha_t.apply("log") - self.sigma_t.apply("log")
        self.lambda_s0 = self.alpha_s0.apply("log") - self.sigma_s0.apply("log")
        self.h = self.lambda_t - self.lambda_s0

        self.D1s: Value | None = None
        self._differences(scheduler, sigma, order)
        self.hh = -self.h if self.predict_x0 else self.h
        self.h_phi_1 = self.hh.apply("expm1")
        self.h_phi_k = self.h_phi_1 / self.hh - 1
        self.B_h = self.hh if scheduler.config.solver_type == "bh1" else self.hh.apply("expm1")
        self._system(order)

    def _differences(self, scheduler: UniPCMultistepScheduler, sigma: Value, order: int) -> None:
        outputs = scheduler.outputs()
        m0 = outputs[0]
        rks: list[Value] = []
        self.differences: list[Value] = []
        for mi in outputs[1:order]:
            self.alpha_si, self.sigma_si = scheduler.sigma_to_alpha_sigma_t(sigma.to_device())
            self.lambda_si = self.alpha_si.apply("log") - self.sigma_si.apply("log")
            self.rk = (self.lambda_si - self.lambda_s0) / self.h
            rks.append(self.rk)
            self.differences.append((mi - m0) / self.rk)
        rks.append(on_device((), "float32", "ones"))
        self.rks = stack(rks, 0)

    def _system(self, order: int) -> None:
        rows: list[Value] = []
        right: list[Value] = []
        for _ in range(order):
            rows.append(self.rks**1)
            right.append(self.h_phi_k * 1 / self.B_h)
            self.h_phi_k = self.h_phi_k / self.hh - 1
        self.R = stack(rows, 0)
        rows.clear()
        self.b = stack(right, 0)

    def stack_differences(self) -> None:
        """``D1s = torch.stack(D1s, dim=1)``."""
        self.D1s = stack(self.differences, 1)
        self.differences.clear()

    @property
    def ratio(self) -> Value:
        """``sigma_t / sigma_s0``, or of the alphas where noise is predicted."""
        return self.sigma_t / self.sigma_s0 if self.predict_x0 else self.alpha_t / self.alpha_s0

    @property
    def scale(self) -> Value:
        """``alpha_t``, or ``sigma_t`` where noise is predicted."""
        return self.alpha_t if self.predict_x0 else self.sigma_t


def stack(values: Sequence[Value], dim: int) -> Value:
    """``torch.stack``."""
    shape = values[0].shape
    return on_device((*shape[:dim], len(values), *shape[dim:]), values[0].dtype, "stack")


def half(dtype: str) -> Value:
    """``torch.ones(1) * 0.5``."""
    return on_device((1,), dtype, "ones") * 0.5


def solve(size: int) -> Value:
    """``torch.linalg.solve``: [n, n] and [n] -> [n], with the factors, pivots and info of _linalg_solve_ex."""
    result = on_device((size,), "float32", "_linalg_solve_ex")
    factors = on_device((size, size), "float32", "_linalg_solve_ex")
    pivots = on_device((size,), "int32", "_linalg_solve_ex")
    info = on_device((), "int32", "_linalg_solve_ex")
    del factors, pivots, info
    return result


def weighted_sum(weights: Value, terms: Value) -> Value:
    """``torch.einsum("k,bkc...->bc...", weights, terms)``: one product for one term, else one bmm."""
    batch, count, *rest = terms.shape
    if count == 1:
        return on_device((batch, *rest), terms.dtype, "mul")
    numel: Size = batch
    for dim in rest:
        numel = numel * dim
    columns = reshape(terms.permute(1, 0, *range(2, terms.ndim)), 1, count, numel)
    row = on_cpu((1, 1, count), weights.dtype)
    return Value(bmm(row, columns, Category.PIPELINE).view(batch, *rest))
