"""Sizes that only look like integers are refused where a layer is made."""

import numpy as np
import pytest
import torch

import mlfast
from mlfast.integers import integer

LAYERS = [
    mlfast.CosineLinear,
    mlfast.CSRA,
    mlfast.GraphAttention,
    mlfast.GroupLinear,
    mlfast.MLDecoder,
    mlfast.Query2Label,
]


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_take_integers_for_sizes(layer):
    name = layer.__name__
    with pytest.raises(TypeError, match=rf"^{name}: in_features must be an integer, got float 16\.0; convert it with"):
        layer(16.0, 4)
    with pytest.raises(TypeError, match=rf"^{name}: \w+ must be an integer, got bool True"):
        layer(16, True)
    sizes = r"in_features=16(, \w+=\d+)* and \w+="
    with pytest.raises(ValueError, match=rf"^{name} needs sizes of at least 1, got {sizes}"):
        layer(16, 0)
    expected = [tensor.shape for tensor in layer(16, 4).parameters()]
    assert [tensor.shape for tensor in layer(np.int64(16), np.int32(4)).parameters()] == expected


def test_ml_decoder_takes_integers_for_all_sizes():
    for name, value in (("embed_dim", 768.0), ("num_heads", 8.0), ("num_groups", 4.0)):
        with pytest.raises(TypeError, match=rf"^MLDecoder: {name} must be an integer, got float {value}; convert it"):
            mlfast.MLDecoder(16, 4, **{name: value})


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), torch.tensor(3), np.array(3)], ids=repr)
def test_integers(value):
    assert integer("f", "x", value) == 3
    assert type(integer("f", "x", value)) is int


@pytest.mark.parametrize("value", [3.0, True, np.True_, torch.tensor(True), np.float64(3), "3", None, [3]], ids=repr)
def test_what_only_looks_like_one(value):
    with pytest.raises(TypeError, match=r"^f: x must be an integer, got "):
        integer("f", "x", value)
