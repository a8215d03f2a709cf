"""reweight_pool: every backend against float64, by the policy of docs/correctness.md."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mlfast
from mlfast.functional import reweight_pool
from mlfast.ops.reweight_pool import LAUNCH, LAUNCH_BACKWARD, reference
from tests.ops.policy import FLOATS, assert_bit_equal, assert_error, assert_written, guarded, over_threads

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.fixture
def backend(backend):
    """The backends that have a kernel; that a request for the other one raises is tested in test_backends.py."""
    if backend == "cuda":
        pytest.skip("reweight_pool has no CUDA C++ kernel")
    return backend


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return LAYOUTS[request.param]


def example(shape, dtype=torch.float32, device="cpu", layout=torch.contiguous_format, seed=0, grid=None):
    """Features and weights of either sign; on a grid of 1 / ``grid`` many positions tie for the maximum."""
    g = torch.Generator().manual_seed(seed)
    features, weight = torch.randn(shape, generator=g), torch.randn(shape[1], generator=g)
    if grid:
        features, weight = (features * grid).round() / grid, (weight * grid).round() / grid
    return features.to(device, dtype).contiguous(memory_format=layout), weight.to(device)


def pooled_and_grads(features, weight):
    """The result and both gradients for an uneven incoming gradient, in float64 on the CPU."""
    features, weight = features.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    out = reweight_pool(features, weight)
    assert out.dtype == features.dtype
    incoming = torch.linspace(0.5, 2, out.numel(), device=out.device).to(out.dtype).view(out.shape)
    grads = torch.autograd.grad(out, (features, weight), incoming)
    return [t.detach().double().cpu() for t in (out, *grads)]


def assert_as_good_as_pytorch(features, weight):
    """Result and gradients against float64, by the policy."""
    got = pooled_and_grads(features, weight)
    with mlfast.use_backend("reference"):
        plain = pooled_and_grads(features, weight)
        truth = pooled_and_grads(features.double(), weight.double())
    dtypes = features.dtype, features.dtype, weight.dtype
    for name, mine, theirs, exact, dtype in zip(("out", "features", "weight"), got, plain, truth, dtypes, strict=True):
        assert_error(f"{name} of {tuple(features.shape)}", mine, theirs, exact, dtype)


# ----------------------------------------------------------------------------------------------------- correctness


@pytest.mark.parametrize("dtype", FLOATS)
def test_formula(backend, device, layout, dtype):
    for seed, shape in enumerate([(3, 7, 5, 6), (2, 70, 14, 14), (1, 3, 50, 45)]):
        assert_as_good_as_pytorch(*example(shape, dtype, device, layout, seed))


@pytest.mark.parametrize("weight_dtype", FLOATS)
def test_weight_dtypes(backend, device, weight_dtype):
    features, weight = example((2, 5, 3, 3), torch.float32, device)
    assert_as_good_as_pytorch(features, weight.to(weight_dtype))


def test_values(backend, device):
    features = torch.tensor([[[[1.0, 2.0], [4.0, -5.0]], [[1.0, 2.0], [4.0, -5.0]]]], device=device)
    out = reweight_pool(features, torch.tensor([3.0, -3.0], device=device))
    assert out.tolist() == [[1.5 + 12.0, -1.5 + 15.0]]


def test_the_reference_is_the_two_poolings_of_pytorch():
    pool = torch.nn.functional
    features, weight = example((3, 8, 4, 5), torch.float64, grid=2)  # many ties
    features.requires_grad_()
    weighted = features * weight.double()[:, None, None]
    expected = pool.adaptive_avg_pool2d(weighted, 1) + pool.adaptive_max_pool2d(weighted, 1)
    got = reference(features, weight.double())
    torch.testing.assert_close(got, expected.flatten(1))
    for mine, theirs in zip(
        torch.autograd.grad(got.sum(), features), torch.autograd.grad(expected.sum(), features), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_first_of_equal_maxima_gets_the_gradient(backend, device, layout, dtype):
    for shape in ((2, 5, 1, 70), (1, 66, 9, 9)):
        features, weight = example(shape, dtype, device, layout, grid=1)
        weight[:3] = torch.tensor([0.0, 1.0, -1.0])
        assert_as_good_as_pytorch(features, weight)
        assert_as_good_as_pytorch(torch.relu(features), weight)


@pytest.mark.parametrize("late", [0, 17, 2047, 2048, 4500])
def test_where_the_maximum_is(backend, device, layout, late):
    features = torch.zeros(1, 2, 1, 4501, device=device).contiguous(memory_format=layout)
    features[0, :, 0, late] = 1
    features[0, :, 0, -1] = 1
    features.requires_grad_()
    reweight_pool(features, torch.tensor([2.0, -0.5], device=device)).sum().backward()
    expected = torch.full((2, 4501), 2.0 / 4501)
    expected[1] = -0.5 / 4501
    expected[0, late] += 2
    expected[1, 0 if late > 0 else 1] -= 0.5  # of a negative weight, the first minimum
    torch.testing.assert_close(features.grad.cpu().view(2, 4501), expected)


@pytest.mark.parametrize("values", [
    [1.0, torch.nan, 2.0, torch.nan], [torch.nan] * 4, [torch.inf, 1.0, -torch.inf, 0.0],
    [-torch.inf] * 4, [1.0, torch.inf, torch.inf, 0.0], [-torch.inf, 3.0, 2.0, 1.0],
])  # fmt: skip
@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_and_infinity_as_in_pytorch(backend, device, layout, dtype, values):
    weight = torch.tensor([1.0, -2.0, 0.0, torch.inf, torch.nan], device=device)
    features = torch.tensor(values).view(1, 1, 2, 2).repeat(2, 5, 1, 1).to(device, dtype)
    got = pooled_and_grads(features.contiguous(memory_format=layout), weight)
    with mlfast.use_backend("reference"):
        expected = pooled_and_grads(features, weight)
    torch.testing.assert_close(got[:2], expected[:2], equal_nan=True, rtol=1e-2, atol=0)
    assert_same_without_grad(features.contiguous(memory_format=layout), weight, got[0])
    # PyTorch adds infinities in another order: it may say inf where the sum of both is NaN, and the reverse.
    assert torch.equal(got[2].isfinite(), expected[2].isfinite())


def assert_same_without_grad(features, weight, expected):
    """Inference does not look for the place of the maximum, and gives the same."""
    with torch.no_grad():
        got = reweight_pool(features, weight)
    torch.testing.assert_close(got, expected.view_as(got).to(got), equal_nan=True, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 9, 7, 7), (2, 33, 14, 14), (1, 3, 18, 19), (1, 5, 1, 1025)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_without_grad(backend, device, layout, dtype, shape):
    features, weight = example(shape, dtype, device=device, layout=layout)
    assert_same_without_grad(features, weight, reweight_pool(features.requires_grad_(), weight).detach())


def test_gradcheck(layout):
    features, weight = example((2, 3, 4, 5), torch.float64, layout=layout)
    assert torch.autograd.gradcheck(reweight_pool, (features.requires_grad_(), weight.double().requires_grad_()))


# ------------------------------------------------------------------------------------------------- shapes and layout


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (3, 5, 1, 1), (2, 1, 3, 3), (1, 65, 1, 7), (2, 31, 7, 7), (3, 2, 33, 31), (1, 2049, 2, 2)]
)
def test_shapes_with_poisoned_memory(backend, device, layout, shape):
    assert_as_good_as_pytorch(*example(shape, torch.float32, device, layout))
    assert_as_good_as_pytorch(*example(shape, torch.bfloat16, device, layout))


def test_layouts(backend, device):
    features, weight = example((4, 6, 5, 5), device=device)
    expected = pooled_and_grads(features, weight)
    wide = torch.full((4, 16, 9, 9), torch.nan, device=device)
    wide[:, 5:11, 2:7, 3:8] = features
    wide_last = wide.contiguous(memory_format=torch.channels_last)
    for same in (wide, wide_last):
        crop = same[:, 5:11, 2:7, 3:8].requires_grad_()
        out = reweight_pool(crop, weight)
        torch.testing.assert_close(out.double().cpu(), expected[0])
        out.sum().backward()
    turned = features.transpose(2, 3).contiguous().transpose(2, 3)
    spread = torch.stack([weight, weight], 1)[:, 0]
    for got in (pooled_and_grads(turned, spread), pooled_and_grads(features.flip(0).flip(0), spread)):
        torch.testing.assert_close(got, expected)
    one = features[:1].expand(4, -1, -1, -1)
    torch.testing.assert_close(reweight_pool(one, weight), reweight_pool(one.contiguous(), weight))


def test_the_gradient_has_the_layout_of_the_features(backend, device, layout):
    features, weight = example((2, 6, 3, 4), device=device, layout=layout)
    reweight_pool(features.requires_grad_(), weight).sum().backward()
    assert features.grad.is_contiguous(memory_format=layout)


def test_guard_bands(backend, device, layout):
    if backend == "reference":
        pytest.skip("allocates its own outputs")
    for shape, dtype in itertools.product(((1, 1, 1, 1), (3, 7, 3, 5), (2, 66, 2, 9)), (torch.float32, torch.bfloat16)):
        features, weight = example(shape, dtype, device, layout)
        sizes = *shape[:2], shape[2] * shape[3], layout == torch.channels_last
        dtypes = dtype, torch.int32, torch.float32
        buffers, outs = zip(*(guarded(shape[:2], kind, device) for kind in dtypes), strict=True)
        LAUNCH[backend](features, sizes, weight, *outs)
        kinds = (shape, dtype), (shape[1:2], torch.float32)
        grad_buffers, grads = zip(*(guarded(*kind, device) for kind in kinds), strict=True)
        LAUNCH_BACKWARD[backend](outs[0].contiguous(), sizes, weight, *outs[1:], *grads)
        assert_written((*buffers, *grad_buffers))
        assert (outs[1] >= 0).all() and (outs[1] < sizes[2]).all()


@pytest.mark.parametrize("shape", [(0, 5, 3, 3), (4, 0, 3, 3), (0, 0, 1, 1)])
def test_empty(backend, device, shape):
    features = torch.zeros(shape, device=device, requires_grad=True)
    weight = torch.ones(shape[1], device=device, requires_grad=True)
    out = reweight_pool(features, weight)
    out.sum().backward()
    assert out.shape == shape[:2]
    assert features.grad.shape == shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("last", [False, True])
def test_more_than_two_to_the_31_elements(last):
    numpy = pytest.importorskip("numpy")
    # calloc gives pages of zeros that take no memory until they are written to
    shape = (33, 256, 256, 1024) if last else (33, 1024, 256, 256)
    features = torch.from_numpy(numpy.zeros(shape, dtype=numpy.float16))
    features = features.permute(0, 3, 1, 2) if last else features
    features[-1, -1, -1, -1] = 2.0
    with torch.no_grad():
        out = reweight_pool(features, torch.ones(1024))
    assert out[-1, -1] == 2 + 2**-15
    assert out.count_nonzero() == 1


@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 20), st.integers(1, 20)),
    dtype=st.sampled_from(FLOATS),
    layout=st.sampled_from(list(LAYOUTS.values())),
    grid=st.sampled_from([None, 1, 8]),
    seed=st.integers(0, 99),
)
def test_any_shape(shape, dtype, layout, grid, seed):
    assert_as_good_as_pytorch(*example(shape, dtype, "cpu", layout, seed, grid))


# -------------------------------------------------------------------------------------------------------- determinism


def test_bit_equal_over_repeats_and_threads(layout):
    features, weight = example((5, 130, 29, 31), layout=layout)
    assert_bit_equal(over_threads(lambda: pooled_and_grads(features, weight)))


def test_bit_equal_over_repeats(backend, device, layout):
    features, weight = example((3, 70, 5, 5), device=device, layout=layout)
    first = pooled_and_grads(features, weight)
    for _ in range(3):
        assert all(map(torch.equal, pooled_and_grads(features, weight), first))
    torch.testing.assert_close(reweight_pool(features, weight).double().cpu(), first[0], rtol=0, atol=0)
