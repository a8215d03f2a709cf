"""Training: `fit` starts a run from a `TrainConfig`, `resume` continues one, `load_model` reads its result."""

from mlfast.models.checkpoint import CheckpointError, load_model
from mlfast.training.config import TrainConfig
from mlfast.training.errors import ConfigError, Diverged, Interrupted, TrainingError
from mlfast.training.fit import RunResult, fit, resume

__all__ = [
    "CheckpointError",
    "ConfigError",
    "Diverged",
    "Interrupted",
    "RunResult",
    "TrainConfig",
    "TrainingError",
    "fit",
    "load_model",
    "resume",
]
