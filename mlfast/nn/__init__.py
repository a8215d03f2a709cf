"""Modules built on the ops of :mod:`mlfast.functional`."""

from mlfast.nn.cosine_linear import CosineLinear
from mlfast.nn.csra import CSRA
from mlfast.nn.gatn import GATN
from mlfast.nn.graph_attention import GraphAttention
from mlfast.nn.graph_branch import GraphBranch
from mlfast.nn.group_linear import GroupLinear
from mlfast.nn.losses import AAMLoss, AsymmetricLoss
from mlfast.nn.ml_decoder import MLDecoder
from mlfast.nn.ml_gcn import MLGCN
from mlfast.nn.pooling import ReweightPool
from mlfast.nn.query2label import Query2Label

__all__ = [
    "CSRA",
    "GATN",
    "MLGCN",
    "AAMLoss",
    "AsymmetricLoss",
    "CosineLinear",
    "GraphAttention",
    "GraphBranch",
    "GroupLinear",
    "MLDecoder",
    "Query2Label",
    "ReweightPool",
]
