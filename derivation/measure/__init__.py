"""Measurements on a CUDA machine, and the scratch profile that follows; torch is imported by the workers alone."""

from derivation.measure.calibrate import calibrate
from derivation.measure.records import Records
from derivation.measure.runner import Job, measure

__all__ = ["Job", "Records", "calibrate", "measure"]
