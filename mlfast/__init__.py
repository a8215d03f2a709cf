"""mlfast: hand-fused kernels for multi-label image classification, with a lean trainer."""

from pathlib import Path as _Path

if not (_Path(__file__).parent / "kernels").exists():
    # Run from the checkout without an install: the folder kernels/ beside this package is mlfast.kernels.
    __path__.append(str(_Path(__file__).resolve().parent.parent))

from mlfast import functional
from mlfast.backends import backends, use_backend
from mlfast.graph import Graph
from mlfast.models import create_model
from mlfast.nn import (
    CSRA,
    AAMLoss,
    AsymmetricLoss,
    CosineLinear,
    GraphAttention,
    GroupLinear,
    MLDecoder,
    Query2Label,
    ReweightPool,
)
from mlfast.sparse_targets import SparseTargets

__version__ = "0.1.0"

__all__ = [
    "CSRA",
    "AAMLoss",
    "AsymmetricLoss",
    "CosineLinear",
    "Graph",
    "GraphAttention",
    "GroupLinear",
    "MLDecoder",
    "Query2Label",
    "ReweightPool",
    "SparseTargets",
    "__version__",
    "backends",
    "create_model",
    "functional",
    "use_backend",
]
