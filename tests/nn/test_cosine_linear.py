import pytest
import torch
from torch.nn import functional as F

from mlfast.nn.cosine_linear import CosineLinear


def test_matches_cosine_similarity():
    torch.manual_seed(0)
    layer = CosineLinear(7, 5).double()
    x = torch.randn(4, 3, 7, dtype=torch.float64)
    expected = F.cosine_similarity(x[..., None, :], layer.weight, dim=-1)
    torch.testing.assert_close(layer(x), expected)
    assert layer(x).dtype == torch.float64


def test_lengths_do_not_matter():
    torch.manual_seed(0)
    layer = CosineLinear(16, 4)
    x = torch.randn(8, 16)
    before = layer(x)
    with torch.no_grad():
        layer.weight.mul_(3)
    torch.testing.assert_close(layer(100 * x), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_give_float32_cosines(dtype):
    torch.manual_seed(0)
    layer = CosineLinear(256, 4)
    x = torch.randn(8, 256).to(dtype)
    assert layer(x).dtype == torch.float32
    torch.testing.assert_close(layer(x), layer(x.float()), rtol=0, atol=0)


def test_autocast_does_not_reach_inside():
    torch.manual_seed(0)
    layer = CosineLinear(256, 4)
    x = torch.randn(8, 256)
    with torch.autocast("cpu", torch.bfloat16):
        inside = layer(x)
    torch.testing.assert_close(inside, layer(x), rtol=0, atol=0)


def test_a_zero_vector_has_cosine_zero_and_a_finite_gradient():
    layer = CosineLinear(6, 3)
    x = torch.zeros(2, 6, requires_grad=True)
    out = layer(x)
    assert (out == 0).all()
    out.sum().backward()
    assert x.grad.isfinite().all() and layer.weight.grad.isfinite().all()


def test_gradient():
    torch.manual_seed(0)
    layer = CosineLinear(5, 3).double()
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: torch.func.functional_call(layer, {"weight": w}, x), (x, layer.weight))


def test_weights_start_with_length_one_and_no_bias():
    layer = CosineLinear(32, 10)
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    torch.testing.assert_close(layer.weight.norm(dim=1), torch.ones(10))


def test_empty_batch():
    assert CosineLinear(4, 3)(torch.zeros(0, 4)).shape == (0, 3)


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        CosineLinear(0, 3)
    with pytest.raises(ValueError, match=r"expects \[\.\.\., 4\], got \[2, 5\]"):
        CosineLinear(4, 3)(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"expects \[\.\.\., 4\], got \[\]"):
        CosineLinear(4, 3)(torch.zeros(()))
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        CosineLinear(4, 3)([0.0, 0.0, 0.0, 0.0])
