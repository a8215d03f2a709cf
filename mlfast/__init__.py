"""mlfast: hand-fused kernels for multi-label image classification, with a lean trainer."""

import importlib as _importlib
from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

if not (_Path(__file__).parent / "kernels").exists():
    # Run from the checkout without an install: the folder kernels/ beside this package is mlfast.kernels.
    __path__.append(str(_Path(__file__).resolve().parent.parent))

from mlfast import functional
from mlfast.backends import backends, use_backend
from mlfast.graph import Graph
from mlfast.models import create_model
from mlfast.nn import (
    CSRA,
    GATN,
    MLGCN,
    AAMLoss,
    AsymmetricLoss,
    CosineLinear,
    GraphAttention,
    GraphBranch,
    GroupLinear,
    MLDecoder,
    Query2Label,
    ReweightPool,
)
from mlfast.sparse_targets import SparseTargets

if _TYPE_CHECKING:
    from mlfast.deploy import Predictor
    from mlfast.models.weights import load_checkpoint
    from mlfast.nn.accelerate import accelerate
    from mlfast.training import TrainConfig, fit

_LAZY = {
    "Predictor": "mlfast.deploy",
    "TrainConfig": "mlfast.training",
    "accelerate": "mlfast.nn.accelerate",
    "fit": "mlfast.training",
    "load_checkpoint": "mlfast.models.weights",
}


def __getattr__(name: str) -> _Any:
    """What few programs call is imported when it is first asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module 'mlfast' has no attribute {name!r}")
    return getattr(_importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


__version__ = "0.1.0"

__all__ = [
    "CSRA",
    "GATN",
    "MLGCN",
    "AAMLoss",
    "AsymmetricLoss",
    "CosineLinear",
    "Graph",
    "GraphAttention",
    "GraphBranch",
    "GroupLinear",
    "MLDecoder",
    "Predictor",
    "Query2Label",
    "ReweightPool",
    "SparseTargets",
    "TrainConfig",
    "__version__",
    "accelerate",
    "backends",
    "create_model",
    "fit",
    "functional",
    "load_checkpoint",
    "use_backend",
]
