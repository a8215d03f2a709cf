import copy
import re

import pytest
import torch

import mlfast
from mlfast.functional import group_linear
from mlfast.nn.group_linear import GroupLinear


@pytest.mark.parametrize(("classes", "groups", "slots"), [(20, 20, 1), (80, 80, 1), (601, 100, 7), (9605, 100, 97)])
def test_sizes_of_ml_decoder(classes, groups, slots):
    layer = GroupLinear(8, classes)
    assert layer.weight.shape == (groups, 8, slots)
    assert layer(torch.randn(2, groups, 8)).shape == (2, classes)


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_module_is_the_function(cosine, bias):
    torch.manual_seed(0)
    layer, x = mlfast.GroupLinear(6, 11, 4, cosine=cosine, bias=bias), torch.randn(3, 4, 6)
    assert set(layer.state_dict()) == ({"weight", "bias"} if bias else {"weight"})
    expected = group_linear(x, layer.weight, layer.bias, num_classes=11, cosine=cosine)
    assert torch.equal(layer(x), expected)
    assert copy.deepcopy(layer).double()(x.double()).dtype == torch.float64
    assert f"num_groups=4, cosine={cosine}, bias={bias}" in repr(layer)


def test_weights_start_as_in_ml_decoder():
    torch.manual_seed(0)
    layer = GroupLinear(64, 400, 100)
    assert (layer.bias == 0).all()
    expected = torch.nn.init.xavier_normal_(torch.empty(100, 64, 4)).std()
    torch.testing.assert_close(layer.weight.std(), expected, rtol=0.05, atol=0)


def test_wrong_sizes_are_refused():
    for sizes in ((0, 5), (4, 0)):
        with pytest.raises(ValueError, match="GroupLinear needs sizes of at least 1, got in_features="):
            GroupLinear(*sizes)
    for groups in (0, 6):
        with pytest.raises(ValueError, match=f"num_groups must be from 1 to the number of classes, 5, got {groups}"):
            GroupLinear(4, 5, groups)
    with pytest.raises(TypeError, match=r"GroupLinear: num_groups must be an integer, got float 5\.0"):
        GroupLinear(4, 5, 5.0)


@pytest.mark.parametrize("shape", [(2, 4, 8), (2, 5, 7), (2, 8)])
def test_vectors_that_do_not_fit_are_refused(shape):
    expected = rf"expects \[B, 5, 8\], a vector for each of num_groups=5, got {re.escape(str(list(shape)))}; make the"
    with pytest.raises(ValueError, match=expected):
        GroupLinear(8, 20, 5)(torch.zeros(shape))
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        GroupLinear(8, 20, 5)([[0.0]])
