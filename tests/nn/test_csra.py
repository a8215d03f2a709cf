import math

import pytest
import torch
from torch.nn import functional as F

from mlfast.nn.csra import CSRA


def make(num_classes=5, dtype=torch.float64, **options):
    torch.manual_seed(0)
    return CSRA(8, num_classes, **options).to(dtype)


def by_the_formula(head, features, num_classes):
    """The paper's equations position by position: attention s, class feature f = g + lam * a, logit <m, f>."""
    tokens = features.flatten(2).transpose(1, 2)
    out = torch.zeros(len(features), num_classes, dtype=features.dtype)
    for number, temperature in enumerate(head.temperatures):
        for k in range(num_classes):
            m = head.weight[number * num_classes + k]
            for b, x in enumerate(tokens):
                if math.isinf(temperature):
                    a = x[(x @ m).argmax()]
                else:
                    s = torch.exp(temperature * (x @ m))
                    a = (s / s.sum()) @ x
                out[b, k] += m @ (x.mean(0) + head.lam * a)
    return out


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_equals_the_formula(heads):
    head = make(num_heads=heads, lam=0.4, cosine=False)
    features = torch.randn(2, 8, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(head(features), by_the_formula(head, features, 5))


@pytest.mark.parametrize("heads", [1, 2])
def test_cosines_are_the_formula_on_unit_vectors(heads):
    head, features = make(num_heads=heads, lam=0.4), torch.randn(2, 8, 3, 4, dtype=torch.float64)
    out = head(features)
    with torch.no_grad():
        head.weight.copy_(F.normalize(head.weight, dim=1))
    torch.testing.assert_close(out, by_the_formula(head, F.normalize(features, dim=1), 5) / (heads * 1.4))
    assert make(num_heads=6).temperatures == [23.0, 46.0, 69.0, 92.0, 115.0, math.inf]


def test_without_attention_it_is_average_pooling():
    head, features = make(lam=0, cosine=False), torch.randn(2, 8, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(head(features), F.linear(features.mean((2, 3)), head.weight))


def test_a_high_temperature_approaches_the_maximum():
    features = torch.randn(2, 8, 3, 4, dtype=torch.float64)
    hot, infinite = (make(temperatures=[t], cosine=False)(features) for t in (1e4, math.inf))
    torch.testing.assert_close(hot, infinite, rtol=0, atol=1e-4)


@pytest.mark.parametrize("cosine", [True, False])
def test_gradient(cosine):
    head = make(2, num_heads=2, cosine=cosine)
    features = torch.randn(2, 8, 2, 2, dtype=torch.float64, requires_grad=True)
    function = lambda x, w: torch.func.functional_call(head, {"weight": w}, x)  # noqa: E731
    assert torch.autograd.gradcheck(function, (features, head.weight), fast_mode=True)


def test_half_precision_layouts_and_the_empty_batch():
    head, features = make(dtype=torch.float32, num_heads=2), torch.randn(2, 8, 3, 5)
    expected = head(features)
    torch.testing.assert_close(head(features.to(memory_format=torch.channels_last)), expected)
    assert head(features[:0]).shape == (0, 5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(head(features), expected, rtol=0, atol=0)
    rounded = head.bfloat16()(features.bfloat16())
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, expected, rtol=0, atol=0.02)


def test_compiles_whole():
    head = make(dtype=torch.float32, num_heads=2)
    features = torch.randn(2, 8, 3, 5)
    compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(features), head(features))


def test_wrong_sizes_name_the_remedy():
    with pytest.raises(ValueError, match="for 1, 2, 4, 6, 8 heads, got num_heads=3; pass temperatures"):
        make(num_heads=3)
    assert make(num_heads=3, temperatures=[1, 2, 3]).weight.shape == (15, 8)
    with pytest.raises(ValueError, match=r"must be 2 values above 0, one per head, got \[1, 0\]"):
        make(num_heads=2, temperatures=[1, 0])
    with pytest.raises(ValueError, match="lam must be at least 0 and finite, got nan"):
        make(lam=float("nan"))
    with pytest.raises(ValueError, match="lam must be at least 0 and finite, got -1"):
        make(lam=-1)
    with pytest.raises(ValueError, match="sizes of at least 1"):
        make(0)
    with pytest.raises(ValueError, match=r"expects features \[B, 8, h, w\], got \[2, 7, 3, 3\]"):
        make()(torch.randn(2, 7, 3, 3))
