"""Scheduler config tables: for each supported class, every key of diffusers with its default."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from .checks import At, Check, flag, integer, number, one_of, optional, strict, text

COMMON: dict[str, object] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "timestep_spacing": "linspace",
    "steps_offset": 0,
}
LEADING = {**COMMON, "timestep_spacing": "leading"}
THRESHOLD: dict[str, object] = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
CLIP: dict[str, object] = {**THRESHOLD, "clip_sample_range": 1.0, "set_alpha_to_one": True}
RESPACED: dict[str, object] = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
SIGMAS: dict[str, object] = {**RESPACED, "final_sigmas_type": "zero", "rescale_betas_zero_snr": False}
FLOW: dict[str, object] = {
    "use_flow_sigmas": False,
    "flow_shift": 1.0,
    "use_dynamic_shifting": False,
    "time_shift_type": "exponential",
}
MULTISTEP = {**COMMON, **THRESHOLD, **SIGMAS, **FLOW, "solver_order": 2, "lower_order_final": True}

SOFT: dict[str, object] = {"beta_start": 0.00085, "beta_end": 0.012}
DISTILLED: dict[str, object] = {
    **LEADING,
    **CLIP,
    **SOFT,
    "beta_schedule": "scaled_linear",
    "original_inference_steps": 50,
    "clip_sample": False,
    "timestep_scaling": 10.0,
    "rescale_betas_zero_snr": False,
}

EDM: dict[str, object] = {
    "num_train_timesteps": 1000,
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "sigma_data": 0.5,
    "sigma_schedule": "karras",
    "prediction_type": "epsilon",
    "rho": 7.0,
    "final_sigmas_type": "zero",
}

DEFAULTS: dict[str, dict[str, object]] = {
    "PNDMScheduler": {**LEADING, "skip_prk_steps": False, "set_alpha_to_one": False},
    "DDIMScheduler": {**LEADING, **CLIP, "clip_sample": True, "rescale_betas_zero_snr": False},
    "EulerDiscreteScheduler": {
        **COMMON,
        **SIGMAS,
        "interpolation_type": "linear",
        "sigma_min": None,
        "sigma_max": None,
        "timestep_type": "discrete",
    },
    "EulerAncestralDiscreteScheduler": {**COMMON, "rescale_betas_zero_snr": False},
    "DPMSolverMultistepScheduler": {
        **MULTISTEP,
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "euler_at_final": False,
        "use_lu_lambdas": False,
        "lambda_min_clipped": -math.inf,
        "variance_type": None,
    },
    "UniPCMultistepScheduler": {
        **MULTISTEP,
        "predict_x0": True,
        "solver_type": "bh2",
        "disable_corrector": (),
        "solver_p": None,
        "sigma_min": None,
        "sigma_max": None,
        "shift_terminal": None,
    },
    "LCMScheduler": DISTILLED,
    "TCDScheduler": DISTILLED,
    "DDPMScheduler": {
        **LEADING,
        **THRESHOLD,
        "clip_sample_range": 1.0,
        "clip_sample": True,
        "variance_type": "fixed_small",
        "rescale_betas_zero_snr": False,
    },
    "DEISMultistepScheduler": {
        **COMMON,
        **THRESHOLD,
        **RESPACED,
        **FLOW,
        "solver_order": 2,
        "lower_order_final": True,
        "algorithm_type": "deis",
        "solver_type": "logrho",
    },
    "HeunDiscreteScheduler": {**COMMON, **RESPACED, **SOFT, "clip_sample": False, "clip_sample_range": 1.0},
    "KDPM2DiscreteScheduler": {**COMMON, **RESPACED, **SOFT},
    "KDPM2AncestralDiscreteScheduler": {**COMMON, **RESPACED, **SOFT},
    "LMSDiscreteScheduler": {**COMMON, **RESPACED},
    "EDMEulerScheduler": EDM,
    "EDMDPMSolverMultistepScheduler": {
        **EDM,
        **THRESHOLD,
        "solver_order": 2,
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "lower_order_final": True,
        "euler_at_final": False,
    },
}
# Why a class of diffusers is not among them.
UNWALKED = {
    "DPMSolverSDEScheduler": "it keeps a tree of noise in torchsde, which is not walked; method = 'trace' takes it"
}
# diffusers drops a key that another scheduler class wrote, so published configs are full of them
KNOWN = sorted({name for keys in DEFAULTS.values() for name in keys})


def _numbers(value: object, at: At) -> tuple[float, ...]:
    if isinstance(value, list | tuple) and len(value) <= 100_000:
        return tuple(number(item, at) for item in value)
    raise at.unsupported(value, "a list of numbers")


def _lambda(value: object, at: At) -> float:
    return -math.inf if value == -math.inf else number(value, at)


CHECKS: dict[str, Check[Any]] = {
    "num_train_timesteps": integer(1, 1_000_000),
    "steps_offset": integer(0, 1_000_000),
    "original_inference_steps": integer(1, 1_000_000),
    "prediction_type": one_of("epsilon", "v_prediction", "sample", "flow_prediction"),
    "timestep_spacing": one_of("linspace", "leading", "trailing"),
    "solver_order": integer(1, 3),
    "algorithm_type": one_of("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++", "deis"),
    "final_sigmas_type": one_of("zero", "sigma_min"),
    "sigma_schedule": one_of("karras", "exponential"),
    "interpolation_type": one_of("linear", "log_linear"),
    "timestep_type": one_of("discrete", "continuous"),
    "beta_schedule": one_of("linear", "scaled_linear", "squaredcos_cap_v2"),
    "solver_type": one_of("midpoint", "heun", "logrho", "bh1", "bh2"),
    "lambda_min_clipped": _lambda,
    "trained_betas": optional(_numbers),
    "disable_corrector": _numbers,
    "variance_type": optional(text),
    "solver_p": one_of(None),
}


def _check(name: str, default: object) -> Check[Any]:
    if name in CHECKS:
        return CHECKS[name]
    if isinstance(default, bool):
        return flag
    return text if isinstance(default, str) else optional(number) if default is None else number


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """The config of a scheduler; a field that its class does not have holds None or False.

    ``items`` holds every key of the class, defaults filled in, sorted; ``given`` what the config itself says.
    """

    class_name: str
    num_train_timesteps: int
    prediction_type: str
    timestep_spacing: str = "linspace"
    steps_offset: int = 0
    skip_prk_steps: bool = False
    solver_order: int | None = None
    solver_type: str | None = None
    algorithm_type: str | None = None
    lower_order_final: bool = False
    euler_at_final: bool = False
    predict_x0: bool = False
    thresholding: bool = False
    clip_sample: bool = False
    items: tuple[tuple[str, object], ...] = ()
    given: tuple[tuple[str, object], ...] = field(default=(), compare=False)

    @property
    def options(self) -> Mapping[str, object]:
        """Every key of the scheduler's class, read-only."""
        return MappingProxyType(dict(self.items))

    def with_class(self, class_name: str) -> SchedulerConfig:
        """Return the config of ``class_name.from_config(scheduler.config)``; raises ``DerivationError``."""
        return scheduler_config(dict(self.given), class_name=class_name)

    def changed(self, **values: Any) -> SchedulerConfig:
        """Return a copy with other values of keys that the class has."""
        known = {name: value for name, value in values.items() if name in self.options}
        fields = {name: value for name, value in known.items() if name in FIELDS}
        return replace(self, items=tuple(sorted({**self.options, **known}.items())), **fields)


FIELDS = frozenset(SchedulerConfig.__dataclass_fields__)


def scheduler_config(
    mapping: object, file: str = "scheduler/scheduler_config.json", class_name: str | None = None
) -> SchedulerConfig:
    """Return the checked config of a scheduler; raises ``DerivationError``."""
    given = strict(mapping, file, known=KNOWN, owner="diffusers' schedulers")
    named = class_name or (mapping.get("_class_name") if isinstance(mapping, Mapping) else None)
    known = one_of(*DEFAULTS)(named, At(file, "_class_name"))
    values = {
        name: _check(name, default)(given.get(name, default), At(file, name))
        for name, default in DEFAULTS[known].items()
    }
    fields = {name: value for name, value in values.items() if name in FIELDS}
    said = tuple(sorted((name, tuple(value) if isinstance(value, list) else value) for name, value in given.items()))
    return SchedulerConfig(class_name=known, items=tuple(sorted(values.items())), given=said, **fields)
