"""diffusers/schedulers: scheduling_k_dpm_2_discrete.py and scheduling_k_dpm_2_ancestral_discrete.py."""

from __future__ import annotations

from derivation.walk.schedulers.arithmetic import Value, on_device
from derivation.walk.schedulers.base import SPACINGS, register
from derivation.walk.schedulers.heun_discrete import SecondOrder


class KDPM2(SecondOrder):
    """A step by the derivative at its middle."""

    @property
    def timestep_dtype(self) -> str:  # type: ignore[override]
        """numpy's own where the timesteps follow from the sigmas."""
        return "float64" if any(self.config.options.get(key) for key in SPACINGS) else "float32"

    @property
    def num_sigmas(self) -> int:
        # every sigma but the first twice, and the last once more
        return self.num_timesteps + 3

    def previous(self, model_output: Value, sample: Value) -> Value:
        sigma = self.sigmas.entry()
        pred_original_sample = self.pred_original_sample(model_output, sample, sigma)

        derivative = (sample - pred_original_sample) / sigma
        first = self.sample is None
        if self.sample is None:
            self.sample = sample
        else:
            sample = self.sample
            self.sample = None

        prev_sample = sample + derivative * sigma
        return prev_sample if first else self.noisy(prev_sample, model_output)

    def noisy(self, prev_sample: Value, model_output: Value) -> Value:
        """Return what a whole step ends with."""
        return prev_sample


@register
class KDPM2DiscreteScheduler(KDPM2):
    """DPM2."""


@register
class KDPM2AncestralDiscreteScheduler(KDPM2):
    """DPM2 with fresh noise at every whole step."""

    def noisy(self, prev_sample: Value, model_output: Value) -> Value:
        noise = on_device(model_output.shape, model_output.dtype, "randn")
        return prev_sample + noise * self.sigmas.entry()
