"""The ops as functions. Each is documented in its own file, ``mlfast/ops/<op>.py``, and in ``docs/<op>.md``."""

from mlfast.ops.aam_loss import aam_loss
from mlfast.ops.asymmetric_loss import asymmetric_loss
from mlfast.ops.cosine_linear import cosine_linear
from mlfast.ops.graph_attention import graph_attention
from mlfast.ops.group_linear import group_linear
from mlfast.ops.reweight_pool import reweight_pool

__all__ = ["aam_loss", "asymmetric_loss", "cosine_linear", "graph_attention", "group_linear", "reweight_pool"]
