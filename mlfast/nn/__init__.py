"""Modules built on the ops of :mod:`mlfast.functional`."""

from mlfast.nn.cosine_linear import CosineLinear
from mlfast.nn.graph_attention import GraphAttention
from mlfast.nn.group_linear import GroupLinear
from mlfast.nn.losses import AAMLoss, AsymmetricLoss
from mlfast.nn.pooling import ReweightPool

__all__ = ["AAMLoss", "AsymmetricLoss", "CosineLinear", "GraphAttention", "GroupLinear", "ReweightPool"]
