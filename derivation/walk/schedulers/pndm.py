"""diffusers/schedulers/scheduling_pndm.py."""

from __future__ import annotations

from derivation.config import SchedulerConfig
from derivation.errors import DerivationError
from derivation.walk.schedulers.arithmetic import Value
from derivation.walk.schedulers.base import AlphasCumprod, register

# timesteps that the Runge-Kutta steps cover, unless skip_prk_steps
PNDM_ORDER = 4


@register
class PNDMScheduler(AlphasCumprod):
    """Pseudo numerical methods: linear multistep over the last four noise predictions."""

    def __init__(self, config: SchedulerConfig, num_inference_steps: int) -> None:
        if not config.skip_prk_steps and num_inference_steps < PNDM_ORDER:
            raise DerivationError(
                f"num_inference_steps = {num_inference_steps} is below {PNDM_ORDER}, which PNDMScheduler needs "
                "where skip_prk_steps is false"
            )
        self.prk_timesteps: list[int] = []
        super().__init__(config, num_inference_steps)
        self.warmup = len(self.prk_timesteps) + 5
        self.cur_model_output: Value | None = None
        self.cur_sample: Value | None = None
        self.ets: list[Value] = []

    def schedule(self) -> list[int]:
        ascending = super().schedule()[::-1]
        if self.config.skip_prk_steps:
            return [*ascending[:-1], *ascending[-2:-1], ascending[-1]][::-1]
        half = self.half_step
        doubled = [t + shift for t in ascending[-PNDM_ORDER:] for shift in (0, half)][:-1]
        self.prk_timesteps = [t for t in doubled for _ in range(2)][1:-1][::-1]
        return self.prk_timesteps + ascending[:-3][::-1]

    @property
    def counter(self) -> int:
        """Steps taken."""
        return self.step_index - self.begin_index

    @property
    def half_step(self) -> int:
        """Half of one step of the schedule."""
        return self.config.num_train_timesteps // self.num_inference_steps // 2

    def previous(self, model_output: Value, sample: Value) -> Value:
        if self.counter < len(self.prk_timesteps):
            return self.step_prk(model_output, sample)
        return self.step_plms(model_output, sample)

    def step_prk(self, model_output: Value, sample: Value) -> Value:
        """A Runge-Kutta evaluation."""
        phase = self.counter % 4
        prev_timestep = self.timesteps[self.step_index] - (0 if self.counter % 2 else self.half_step)
        timestep = self.prk_timesteps[self.counter // 4 * 4]

        if phase == 3:
            assert self.cur_model_output is not None
            model_output = self.cur_model_output + 1 / 6 * model_output
            self.cur_model_output = None
        elif self.cur_model_output is None:
            self.cur_model_output = 1 / 6 * model_output + 0
        else:
            1 / 3 * model_output  # added in place
        if phase == 0:
            self.ets.append(model_output)
            self.cur_sample = sample
        cur_sample = self.cur_sample if self.cur_sample is not None else sample
        return self._get_prev_sample(cur_sample, timestep, prev_timestep, model_output)

    def step_plms(self, model_output: Value, sample: Value) -> Value:
        """A linear multistep."""
        timestep = self.timesteps[self.step_index]
        prev_timestep = self.prev_timestep(timestep)
        if self.counter != 1:
            self.ets = self.ets[-3:]
            self.ets.append(model_output)
        else:
            timestep, prev_timestep = 2 * timestep - prev_timestep, timestep

        if len(self.ets) == 1 and self.counter == 0:
            self.cur_sample = sample
        elif len(self.ets) == 1 and self.counter == 1:
            assert self.cur_sample is not None
            model_output = (model_output + self.ets[-1]) / 2
            sample = self.cur_sample
            self.cur_sample = None
        elif len(self.ets) == 2:
            model_output = (3 * self.ets[-1] - self.ets[-2]) / 2
        elif len(self.ets) == 3:
            model_output = (23 * self.ets[-1] - 16 * self.ets[-2] + 5 * self.ets[-3]) / 12
        else:
            model_output = (1 / 24) * (55 * self.ets[-1] - 59 * self.ets[-2] + 37 * self.ets[-3] - 9 * self.ets[-4])

        return self._get_prev_sample(sample, timestep, prev_timestep, model_output)

    def _get_prev_sample(self, sample: Value, timestep: int, prev_timestep: int, model_output: Value) -> Value:
        """Formula (9) of the PNDM paper."""
        alpha_prod_t = self.alpha_prod(timestep)
        alpha_prod_t_prev = self.alpha_prod(prev_timestep)
        beta_prod_t = 1 - alpha_prod_t
        beta_prod_t_prev = 1 - alpha_prod_t_prev

        if self.config.prediction_type == "v_prediction":
            model_output = (alpha_prod_t**0.5) * model_output + (beta_prod_t**0.5) * sample

        sample_coeff = (alpha_prod_t_prev / alpha_prod_t) ** (0.5)

        model_output_denom_coeff = alpha_prod_t * beta_prod_t_prev ** (0.5) + (
            alpha_prod_t * beta_prod_t * alpha_prod_t_prev
        ) ** (0.5)

        prev_sample = (
            sample_coeff * sample - (alpha_prod_t_prev - alpha_prod_t) * model_output / model_output_denom_coeff
        )
        return prev_sample
