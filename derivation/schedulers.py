"""diffusers/schedulers: the tensors a scheduler keeps and computes in one denoising step.

Latents are [N, C, h, w]; ``timesteps`` stay on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable

from derivation.config import SchedulerConfig
from derivation.errors import DerivationError
from derivation.ops import add, div, elementwise, empty, mul, rsub, sub
from derivation.tape import Category, SymTensor

SCHEDULERS: dict[str, Callable[[SchedulerConfig, int], Scheduler]] = {}


def register(cls: type[Scheduler]) -> type[Scheduler]:
    """Register a scheduler under its class name, which is diffusers'."""
    SCHEDULERS[cls.__name__] = cls
    return cls


def make_scheduler(config: SchedulerConfig, num_inference_steps: int) -> Scheduler:
    """Return the scheduler that ``config`` names; raises DerivationError for one that is not supported."""
    if config.class_name not in SCHEDULERS:
        raise DerivationError(
            f"scheduler {config.class_name} is not supported (supported: {', '.join(sorted(SCHEDULERS))})"
        )
    return SCHEDULERS[config.class_name](config, num_inference_steps)


class Scheduler:
    """What every scheduler shares: a step counter and, once add_noise has run, its table on the device."""

    order = 1

    def __init__(self, config: SchedulerConfig, num_inference_steps: int) -> None:
        self.config = config
        self.num_inference_steps = num_inference_steps
        self.counter = 0
        self.table: SymTensor | None = None

    @property
    def num_timesteps(self) -> int:
        """Entries of ``timesteps``: UNet calls of a whole schedule."""
        return self.num_inference_steps

    @property
    def settled(self) -> bool:
        """Whether every further step but the last allocates and keeps the same."""
        return self.counter >= 2

    def init_noise(self, latents: SymTensor) -> SymTensor:
        """``latents * init_noise_sigma``."""
        return mul(latents)

    def scale_model_input(self, sample: SymTensor) -> SymTensor:
        """Return the UNet's input for ``sample``."""
        return sample

    def step(self, model_output: SymTensor, sample: SymTensor, last: bool) -> SymTensor:
        """Return the previous, less noisy sample; ``last`` marks the schedule's last step."""
        raise NotImplementedError

    def add_noise(self, original_samples: SymTensor, noise: SymTensor) -> SymTensor:
        """Return noised ``original_samples``."""
        raise NotImplementedError

    def scalar(self, op: str, on_device: bool = True) -> SymTensor | None:
        """Allocate a float32 scalar where the table is on the device."""
        if self.table is None or not on_device:
            return None
        return empty((), "float32", op, Category.PIPELINE)


class AlphasCumprod(Scheduler):
    """Schedulers whose ``add_noise`` moves ``alphas_cumprod`` to the device for good."""

    def add_noise(self, original_samples: SymTensor, noise: SymTensor) -> SymTensor:
        batch = original_samples.shape[0]
        steps = self.config.num_train_timesteps
        self.table = empty((steps,), "float32", "_to_copy", Category.PIPELINE)
        alphas_cumprod = self.table
        if original_samples.dtype != "float32":
            alphas_cumprod = empty((steps,), original_samples.dtype, "_to_copy", Category.PIPELINE)
        timesteps = empty((batch,), "int64", "_to_copy", Category.PIPELINE)
        sqrt_alpha_prod = elementwise("pow", _take(alphas_cumprod, timesteps))
        sqrt_one_minus_alpha_prod = elementwise("pow", rsub(_take(alphas_cumprod, timesteps)))
        noisy_samples = add(
            _scaled(sqrt_alpha_prod, original_samples), _scaled(sqrt_one_minus_alpha_prod, noise)
        )
        return noisy_samples


def _take(table: SymTensor, indices: SymTensor) -> SymTensor:
    return empty(indices.shape, table.dtype, "index", Category.PIPELINE)


def _scaled(coefficients: SymTensor, x: SymTensor) -> SymTensor:
    """[N] x [N, C, h, w] -> [N, C, h, w]."""
    return empty(x.shape, x.dtype, "mul", Category.PIPELINE)


@register
class PNDMScheduler(AlphasCumprod):
    """diffusers/schedulers/scheduling_pndm.py."""

    def __init__(self, config: SchedulerConfig, num_inference_steps: int) -> None:
        super().__init__(config, num_inference_steps)
        self.skip_prk_steps = config.skip_prk_steps
        self.cur_model_output: SymTensor | None = None
        self.cur_sample: SymTensor | None = None
        self.ets: list[SymTensor] = []

    @property
    def prk_steps(self) -> int:
        """Runge-Kutta evaluations before the linear multistep begins."""
        return 0 if self.skip_prk_steps else 12

    @property
    def num_timesteps(self) -> int:
        if self.skip_prk_steps:
            return self.num_inference_steps + (self.num_inference_steps > 1)
        return max(self.num_inference_steps - 3, 0) + self.prk_steps

    @property
    def settled(self) -> bool:
        return self.counter >= self.prk_steps + 5

    def step(self, model_output: SymTensor, sample: SymTensor, last: bool) -> SymTensor:
        if self.counter < self.prk_steps:
            return self.step_prk(model_output, sample)
        return self.step_plms(model_output, sample, last)

    def step_prk(self, model_output: SymTensor, sample: SymTensor) -> SymTensor:
        phase = self.counter % 4
        if phase == 3:
            assert self.cur_model_output is not None
            model_output = add(self.cur_model_output, mul(model_output))
            self.cur_model_output = None
        elif self.cur_model_output is None:
            self.cur_model_output = add(mul(model_output), model_output)
        else:
            mul(model_output)
        if phase == 0:
            self.ets.append(model_output)
            self.cur_sample = sample
        cur_sample = self.cur_sample if self.cur_sample is not None else sample
        prev_sample = self._get_prev_sample(cur_sample, model_output, last=False)
        self.counter += 1
        return prev_sample

    def step_plms(self, model_output: SymTensor, sample: SymTensor, last: bool) -> SymTensor:
        if self.counter != 1:
            self.ets = self.ets[-3:]
            self.ets.append(model_output)
        ets = self.ets
        if len(ets) == 1 and self.counter == 0:
            self.cur_sample = sample
        elif len(ets) == 1 and self.counter == 1:
            assert self.cur_sample is not None
            model_output = div(add(model_output, ets[-1]))
            sample = self.cur_sample
            self.cur_sample = None
        elif len(ets) == 2:
            model_output = div(sub(mul(ets[-1]), ets[-2]))
        elif len(ets) == 3:
            model_output = div(add(sub(mul(ets[-1]), mul(ets[-2])), mul(ets[-3])))
        else:
            model_output = mul(sub(add(sub(mul(ets[-1]), mul(ets[-2])), mul(ets[-3])), mul(ets[-4])))
        prev_sample = self._get_prev_sample(sample, model_output, last)
        self.counter += 1
        return prev_sample

    def _get_prev_sample(self, sample: SymTensor, model_output: SymTensor, last: bool) -> SymTensor:
        """Formula (9) of the PNDM paper; ``final_alpha_cumprod`` of the last step stays on the CPU."""
        on_device = not (last and self._below_zero())
        beta_prod_t = self.scalar("rsub")
        beta_prod_t_prev = self.scalar("rsub", on_device)
        if self.config.prediction_type == "v_prediction":
            model_output = add(
                self._weighted(model_output, self.scalar("pow")), self._weighted(sample, self.scalar("pow"))
            )
        sample_coeff = self._chain("div", "pow")
        denominator = self._denominator(on_device)
        prev_sample = sub(
            self._weighted(sample, sample_coeff), div(self._weighted(model_output, self.scalar("sub")))
        )
        del beta_prod_t, beta_prod_t_prev, denominator
        return prev_sample

    def _below_zero(self) -> bool:
        """Whether the last step's previous timestep is negative."""
        offset = self.config.steps_offset if self.config.timestep_spacing == "leading" else 0
        return offset < self.config.num_train_timesteps // self.num_inference_steps

    def _chain(self, *ops: str) -> SymTensor | None:
        """Allocate one scalar after another, each freed once the next exists."""
        result: SymTensor | None = None
        for op in ops:
            result = self.scalar(op)
        return result

    def _denominator(self, on_device: bool) -> SymTensor | None:
        """``a * b ** 0.5 + (a * c * d) ** 0.5``."""
        root = self.scalar("pow", on_device)
        left = self.scalar("mul")
        del root
        right = self._chain("mul", "mul", "pow")
        total = self.scalar("add")
        del left, right
        return total

    @staticmethod
    def _weighted(x: SymTensor, weight: SymTensor | None) -> SymTensor:
        return mul(x)

