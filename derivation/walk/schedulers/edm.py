"""diffusers/schedulers: scheduling_edm_euler.py and scheduling_edm_dpmsolver_multistep.py."""

from __future__ import annotations

from derivation.tape.tensor import SymTensor
from derivation.walk.schedulers.arithmetic import Value, on_device
from derivation.walk.schedulers.base import Sigmas, register
from derivation.walk.schedulers.dpmsolver_multistep import DPMSolver
from derivation.walk.schedulers.thresholding import threshold_sample


class Preconditioned(Sigmas):
    """What both share: float32 timesteps, and input, noise and output preconditioned by sigma."""

    timestep_dtype = "float32"
    prediction_types: tuple[str, ...] = ("epsilon", "v_prediction")

    def scale_model_input(self, sample: SymTensor) -> SymTensor:
        sigma = self.sigmas.entry()
        c_in = 1 / ((sigma**2 + 1) ** 0.5)
        return Value(sample) * c_in

    def precondition_outputs(self, sample: Value, model_output: Value) -> Value:
        """Compute the predicted x_0; c_skip and c_out are scalars on the CPU."""
        c = self.sigmas.entry()
        denoised = c * sample + c * model_output
        return denoised

    def noised(self, original_samples: Value, noise: Value, sigma: Value) -> Value:
        noisy_samples = original_samples + noise * sigma
        return noisy_samples


@register
class EDMEulerScheduler(Preconditioned):
    """Euler's method (s_churn = 0), float32 inside a step."""

    def previous(self, model_output: Value, sample: Value) -> Value:
        sample = sample.to("float32")
        sigma_hat = self.sigmas.entry()
        pred_original_sample = self.precondition_outputs(sample, model_output)

        derivative = (sample - pred_original_sample) / sigma_hat
        dt = self.sigmas.entry() - sigma_hat
        prev_sample = sample + derivative * dt

        prev_sample = prev_sample.to(model_output.dtype)
        return prev_sample


@register
class EDMDPMSolverMultistepScheduler(Preconditioned, DPMSolver):
    """DPM-Solver++ and its SDE variant, in the samples' dtype throughout."""

    def check(self) -> None:
        self.expect("algorithm_type", "dpmsolver++", "sde-dpmsolver++", "deis")
        if self.config.algorithm_type == "deis":
            self.expect("final_sigmas_type", "sigma_min")
        if self.config.algorithm_type == "sde-dpmsolver++":
            self.expect("solver_order", 1, 2)

    def previous(self, model_output: Value, sample: Value) -> Value:
        model_output = self.convert_model_output(model_output, sample)
        self.keep(model_output)
        noise = on_device(model_output.shape, model_output.dtype, "randn") if self.stochastic else None

        prev_sample = (self.first_order, self.second_order, self.third_order)[self.order_now - 1](sample, noise)
        if self.lower_order_nums < self.solver_order:
            self.lower_order_nums += 1
        return prev_sample

    def convert_model_output(self, model_output: Value, sample: Value) -> Value:
        x0_pred = self.precondition_outputs(sample, model_output)
        if self.config.thresholding:
            x0_pred = threshold_sample(x0_pred)
        return x0_pred
