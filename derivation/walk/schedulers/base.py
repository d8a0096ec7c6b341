"""What every scheduler shares: registration, the timetable, noising by a table of alphas or of sigmas."""

from __future__ import annotations

import math
from collections.abc import Callable

from derivation.config import SchedulerConfig
from derivation.errors import DerivationError, unsupported
from derivation.registry import Registry
from derivation.tape.tensor import SymTensor
from derivation.walk.schedulers.arithmetic import Value, on_cpu, on_device

SCHEDULERS: Registry[Callable[[SchedulerConfig, int], Scheduler]] = Registry("scheduler")
PREDICTION_TYPES = ("epsilon", "v_prediction")
# of which diffusers takes one at most
SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
# what replaces the spacing of the timesteps
RESPACED = (*SPACINGS, "use_lu_lambdas", "use_flow_sigmas")


def register(cls: type[Scheduler]) -> type[Scheduler]:
    """Register a scheduler under its class name, which is diffusers'."""
    return SCHEDULERS.register(cls.__name__)(cls)


def make_scheduler(config: SchedulerConfig, num_inference_steps: int) -> Scheduler:
    """Return the scheduler that ``config`` names; raises DerivationError for one that is not supported."""
    if config.class_name not in SCHEDULERS:
        raise DerivationError(
            f"scheduler {config.class_name} is not supported (supported: {', '.join(sorted(SCHEDULERS))})"
        )
    return SCHEDULERS[config.class_name](config, num_inference_steps)


class Scheduler:
    """A scheduler after ``set_timesteps``; ``step_index`` counts from the first of all timesteps.

    ``timestep_dtype`` is the dtype of ``timesteps``, which stay on the CPU. All but the last ``tail`` steps
    allocate and keep the same once ``settled``.
    """

    order = 1
    tail = 1
    warmup = 1
    timestep_dtype = "int64"
    prediction_types: tuple[str, ...] = PREDICTION_TYPES

    def __init__(self, config: SchedulerConfig, num_inference_steps: int) -> None:
        self.config = config
        self.num_inference_steps = num_inference_steps
        self.begin_index = 0
        self.step_index = 0
        self.expect("prediction_type", *self.prediction_types)
        self.expect("use_dynamic_shifting", False, None)
        if num_inference_steps > config.num_train_timesteps:
            raise DerivationError(
                f"num_inference_steps = {num_inference_steps} is above num_train_timesteps = "
                f"{config.num_train_timesteps} of {config.class_name}"
            )

    def expect(self, key: str, *supported: object) -> None:
        """Raise DerivationError unless the config's ``key`` is absent or one of ``supported``."""
        value = self.config.options.get(key, supported[0])
        if value not in supported:
            names = ", ".join(map(repr, supported))
            raise unsupported(f"{self.config.class_name}: {key}", value, names)

    @property
    def num_timesteps(self) -> int:
        """Entries of ``timesteps``: UNet calls of a whole schedule."""
        steps, train = self.num_inference_steps, self.config.num_train_timesteps
        # numpy: arange(train, 0, -train / steps) has ceil(train / (train / steps)) entries
        return math.ceil(train / (train / steps)) if self.config.timestep_spacing == "trailing" else steps

    @property
    def last(self) -> bool:
        """Whether the step to come is the schedule's last."""
        return self.step_index == self.num_timesteps - 1

    @property
    def settled(self) -> bool:
        """Whether every further step but the last ones allocates and keeps the same."""
        return self.step_index - self.begin_index >= self.warmup

    def set_begin_index(self, begin_index: int) -> None:
        """Begin at a later timestep."""
        self.begin_index = self.step_index = begin_index

    def init_noise(self, latents: SymTensor) -> SymTensor:
        """``latents * init_noise_sigma``, a number or a scalar on the CPU."""
        return Value(latents) * 1.0

    def scale_model_input(self, sample: SymTensor) -> SymTensor:
        """Return the UNet's input for ``sample``."""
        return sample

    def step(self, model_output: SymTensor, sample: SymTensor) -> SymTensor:
        """Return the previous, less noisy sample."""
        model_output, sample = Value(model_output), Value(sample)
        prev_sample = self.previous(model_output, sample)
        self.step_index += 1
        return prev_sample

    def previous(self, model_output: Value, sample: Value) -> Value:
        """Compute the previous sample as the scheduler's ``step()`` does."""
        raise NotImplementedError

    def add_noise(self, original_samples: SymTensor, noise: SymTensor, count: int | None = None) -> SymTensor:
        """Return noised ``original_samples`` at ``count`` timesteps (None: one for each sample)."""
        raise NotImplementedError


class AlphasCumprod(Scheduler):
    """Schedulers whose ``add_noise`` moves ``alphas_cumprod`` to the device for good."""

    def __init__(self, config: SchedulerConfig, num_inference_steps: int) -> None:
        super().__init__(config, num_inference_steps)
        self.timesteps = self.schedule()
        self.alphas_cumprod = on_cpu((config.num_train_timesteps,), "float32")
        self.final_alpha_cumprod = on_cpu((), "float32")

    @property
    def num_timesteps(self) -> int:
        return len(self.timesteps)

    def schedule(self) -> list[int]:
        """Return the timesteps, from the noisiest on."""
        train, steps = self.config.num_train_timesteps, self.num_inference_steps
        if self.config.timestep_spacing == "leading":
            return [i * (train // steps) + self.config.steps_offset for i in reversed(range(steps))]
        if self.config.timestep_spacing == "trailing":
            return [round(train - i * (train / steps)) - 1 for i in range(super().num_timesteps)]
        return [round(i * ((train - 1) / max(steps - 1, 1))) for i in reversed(range(steps))]

    def alpha_prod(self, timestep: int) -> Value:
        """``alphas_cumprod[timestep]``, or ``final_alpha_cumprod``, which stays on the CPU, below timestep 0."""
        return self.alphas_cumprod.entry() if timestep >= 0 else self.final_alpha_cumprod

    def prev_timestep(self, timestep: int) -> int:
        """Return ``timestep`` less one step of the schedule."""
        return timestep - self.config.num_train_timesteps // self.num_inference_steps

    def add_noise(self, original_samples: SymTensor, noise: SymTensor, count: int | None = None) -> SymTensor:
        original_samples, noise = Value(original_samples), Value(noise)
        self.alphas_cumprod = self.alphas_cumprod.to_device()
        alphas_cumprod = self.alphas_cumprod.to(original_samples.dtype)
        timesteps = on_device((count or original_samples.shape[0],), "int64", "_to_copy")

        sqrt_alpha_prod = alphas_cumprod.entries(timesteps.shape[0]) ** 0.5
        sqrt_alpha_prod = sqrt_alpha_prod.columns(original_samples.ndim)

        sqrt_one_minus_alpha_prod = (1 - alphas_cumprod.entries(timesteps.shape[0])) ** 0.5
        sqrt_one_minus_alpha_prod = sqrt_one_minus_alpha_prod.columns(original_samples.ndim)

        noisy_samples = sqrt_alpha_prod * original_samples + sqrt_one_minus_alpha_prod * noise
        return noisy_samples


class Sigmas(Scheduler):
    """Schedulers with a float32 table of ``sigmas`` that stays on the CPU."""

    def __init__(self, config: SchedulerConfig, num_inference_steps: int) -> None:
        super().__init__(config, num_inference_steps)
        if len(chosen := [key for key in SPACINGS if config.options.get(key)]) > 1:
            given = " with ".join(f"{key} = True" for key in chosen)
            raise DerivationError(f"{config.class_name}: {given} is not supported (supported: one of them)")
        self.sigmas = on_cpu((self.num_sigmas,), "float32")
        self.timesteps = on_cpu((self.num_timesteps,), self.timestep_dtype)

    @property
    def num_timesteps(self) -> int:
        if any(self.config.options.get(key) for key in RESPACED):
            return self.num_inference_steps
        return super().num_timesteps

    @property
    def num_sigmas(self) -> int:
        """Entries of ``sigmas``: one a timestep, and the final one."""
        return self.num_timesteps + 1

    def add_noise(self, original_samples: SymTensor, noise: SymTensor, count: int | None = None) -> SymTensor:
        original_samples, noise = Value(original_samples), Value(noise)
        sigmas = self.sigmas.to_device(original_samples.dtype)
        schedule_timesteps = self.timesteps.to_device()
        timesteps = on_device((count or original_samples.shape[0],), self.timestep_dtype, "_to_copy")

        sigma = sigmas.entries(timesteps.shape[0]).columns(original_samples.ndim)

        noisy_samples = self.noised(original_samples, noise, sigma)
        del schedule_timesteps
        return noisy_samples

    def noised(self, original_samples: Value, noise: Value, sigma: Value) -> Value:
        """Combine sample and noise at ``sigma``."""
        raise NotImplementedError
