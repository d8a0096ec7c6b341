"""The symbolic interpreter: operators, blocks, models, schedulers and pipelines."""
