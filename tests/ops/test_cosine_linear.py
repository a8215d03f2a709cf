"""cosine_linear: every backend against float64, by the policy of docs/correctness.md."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mlfast
from mlfast.functional import cosine_linear
from mlfast.ops.cosine_linear import INVERSE_NORMS, PROJECT, SCALE, reference
from tests.ops.policy import FLOATS, assert_bit_equal, assert_error, assert_written, guarded, over_threads


@pytest.fixture
def backend(backend):
    """The backends that have a kernel; that a request for the other one raises is tested in test_backends.py."""
    if backend == "cuda":
        pytest.skip("cosine_linear has no CUDA C++ kernel")
    return backend


def example(batch, length, classes, dtype=torch.float32, device="cpu", seed=0):
    """Features and weights whose lengths differ by orders of magnitude, as no two rows of a trained layer agree."""
    g = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(batch, length, generator=g), torch.randn(classes, length, generator=g)
    x *= torch.logspace(-2, 2, batch)[:, None]
    weight *= torch.logspace(1, -2, classes)[:, None]
    return x.to(device, dtype), weight.to(device)


def cosines_and_grads(x, weight):
    """The result and both gradients for an uneven incoming gradient, in float64 on the CPU."""
    x, weight = x.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    out = cosine_linear(x, weight)
    assert out.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    incoming = torch.linspace(-0.5, 2, out.numel(), device=out.device).to(out.dtype).view(out.shape)
    grads = torch.autograd.grad(out, (x, weight), incoming)
    assert [grad.dtype for grad in grads] == [x.dtype, weight.dtype]
    return [t.detach().double().cpu() for t in (out, *grads)]


def largest_values(x, weight):
    """Of what the result and each gradient are computed from, by which rounding is measured.

    A cosine is a sum of terms that cancel; a gradient is a vector minus its part along another. What is left may be as
    small as one pleases, and is exactly 0 where D is 1.
    """
    x, weight = x.double().cpu().reshape(-1, x.shape[-1]), weight.double().cpu()
    incoming = torch.linspace(-0.5, 2, len(x) * len(weight), dtype=torch.float64).view(len(x), len(weight))
    lengths = x.norm(dim=1, keepdim=True) * weight.norm(dim=1)
    terms, scaled = x.abs() @ weight.abs().t() / lengths, incoming / lengths
    return [t.abs().max().item() for t in (terms, scaled @ weight, scaled.t() @ x)]


def assert_as_good_as_pytorch(x, weight):
    """Result and gradients against float64, by the policy."""
    got = cosines_and_grads(x, weight)
    with mlfast.use_backend("reference"):
        plain = cosines_and_grads(x, weight)
        truth = cosines_and_grads(x.double(), weight.double())
    dtypes = torch.promote_types(x.dtype, torch.float32), x.dtype, weight.dtype
    results = zip(("out", "x", "weight"), dtypes, largest_values(x, weight), got, plain, truth, strict=True)
    for name, dtype, largest, mine, theirs, exact in results:
        floor = max(4 * torch.finfo(dtype).eps, 1e-14) * largest  # in float64 the truth itself is rounded
        assert_error(f"{name} of {tuple(x.shape)}", mine, theirs, exact, dtype, floor)


# ----------------------------------------------------------------------------------------------------- correctness


@pytest.mark.parametrize("dtype", FLOATS)
def test_formula(backend, device, dtype):
    for seed, sizes in enumerate([(3, 7, 5), (4, 260, 9), (2, 1500, 3)]):
        assert_as_good_as_pytorch(*example(*sizes, dtype, device, seed))


@pytest.mark.parametrize("weight_dtype", FLOATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_dtypes(backend, device, dtype, weight_dtype):
    x, weight = example(3, 20, 5, dtype, device)
    assert_as_good_as_pytorch(x, weight.to(weight_dtype))


def test_values(backend, device):
    x = torch.tensor([[3.0, 4.0], [0.0, -2.0]], device=device)
    weight = torch.tensor([[10.0, 0.0], [0.0, 0.1], [-6.0, -8.0]], device=device)
    expected = torch.tensor([[0.6, 0.8, -1.0], [0.0, -1.0, 0.8]], device=device)
    torch.testing.assert_close(cosine_linear(x, weight), expected)


def test_the_reference_is_the_cosine_similarity_of_pytorch():
    x, weight = example(6, 20, 5, torch.float64)
    expected = torch.nn.functional.cosine_similarity(x[:, None], weight.double(), dim=-1)
    torch.testing.assert_close(reference(x, weight.double()), expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("length", [0.0, 1e-16, 0.9e-12, 1.1e-12])
def test_short_vectors_are_clamped_as_in_pytorch(backend, device, dtype, length):
    x, weight = example(3, 8, 4, dtype, device)
    x[1] *= length / x[1].double().norm()
    weight[2] *= length / weight[2].double().norm()
    got = cosines_and_grads(x, weight)
    with mlfast.use_backend("reference"):
        expected = cosines_and_grads(x, weight)
    tolerance = 0.02 if dtype in (torch.bfloat16, torch.float16) else 1e-5  # of a gradient's own dtype
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance * 1e-2)
    assert all(t.isfinite().all() for t in got) == all(t.isfinite().all() for t in expected)


def test_a_zero_vector_has_cosine_zero_and_finite_gradients(backend, device):
    x, weight = example(3, 8, 4, device=device)
    x[1] = 0
    out, grad_x, grad_weight = cosines_and_grads(x, weight)
    assert (out[1] == 0).all()
    assert grad_x.isfinite().all() and grad_weight.isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_stay_in_their_row(backend, device, value):
    x, weight = example(4, 8, 5, device=device)
    x[2, 3] = value
    out, grad_x, _ = cosines_and_grads(x, weight)
    others = [0, 1, 3]
    assert out[2].isnan().all() and grad_x[2].isnan().all()
    assert out[others].isfinite().all() and grad_x[others].isfinite().all()


@pytest.mark.parametrize("length", [1e-9, 1e9, 1e18])
def test_the_gradient_by_a_vector_is_orthogonal_to_it(backend, device, length):
    x, weight = example(3, 50, 6, device=device)
    x *= length / x.norm(dim=1, keepdim=True)
    _, grad_x, grad_weight = cosines_and_grads(x, weight)
    for grad, vectors in ((grad_x, x), (grad_weight, weight)):
        assert torch.cosine_similarity(grad, vectors.double().cpu(), dim=1).abs().max() < 1e-6
    assert (grad_x.norm(dim=1) * length > 0.1).all()


def test_gradcheck(backend, device):
    if device.type != "cpu":
        pytest.skip("the double kernels are checked on a CPU")
    x, weight = example(2, 5, 3, torch.float64)
    assert torch.autograd.gradcheck(cosine_linear, (x.requires_grad_(), weight.double().requires_grad_()))


# ------------------------------------------------------------------------------------------------- shapes and layout


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 1, 2), (1, 5, 7), (2, 31, 1), (5, 33, 1), (1, 2, 7), (1, 4099, 2)])
def test_sizes_with_poisoned_memory(backend, device, sizes):
    assert_as_good_as_pytorch(*example(*sizes, torch.float32, device))
    assert_as_good_as_pytorch(*example(*sizes, torch.bfloat16, device))


@pytest.mark.parametrize("shape", [(6,), (2, 6), (2, 3, 6), (2, 1, 3, 6)])
def test_any_number_of_dimensions(backend, device, shape):
    x, weight = torch.randn(shape, device=device), torch.randn(4, 6, device=device)
    assert cosine_linear(x, weight).shape == (*shape[:-1], 4)
    assert_as_good_as_pytorch(x, weight)


def test_layouts(backend, device):
    x, weight = example(4, 6, 5, device=device)
    expected = cosines_and_grads(x, weight)
    wide = torch.full((9, 16), torch.nan, device=device)
    wide[2:6, 5:11] = x
    crop = wide[2:6, 5:11]
    for same in (crop, x.t().contiguous().t(), x.flip(0).flip(0)):
        leaf_x, leaf_weight = same.detach().requires_grad_(), weight.t().contiguous().t().requires_grad_()
        out = cosine_linear(leaf_x, leaf_weight)
        torch.testing.assert_close(out.double().cpu(), expected[0], rtol=1e-5, atol=1e-6)
        incoming = torch.linspace(-0.5, 2, out.numel(), device=device).view(out.shape)
        grads = torch.autograd.grad(out, (leaf_x, leaf_weight), incoming)
        for grad, same_grad in zip(grads, expected[1:], strict=True):
            torch.testing.assert_close(grad.double().cpu(), same_grad, rtol=1e-5, atol=1e-4)
    one = x[:1].expand(4, -1)
    torch.testing.assert_close(cosine_linear(one, weight), cosine_linear(one.contiguous(), weight))


def test_guard_bands(backend, device):
    if backend == "reference":
        pytest.skip("allocates its own outputs")
    for sizes, dtype in itertools.product(((1, 1, 1), (3, 37, 5), (2, 9, 1025)), (torch.float32, torch.float64)):
        batch, length, classes = sizes
        x, weight = (t.to(dtype) for t in example(*sizes, device=device))
        shapes = (batch,), (classes,), (batch, classes), (batch, length), (classes, length)
        buffers, outs = zip(*(guarded(shape, dtype, device) for shape in shapes), strict=True)
        inverse_x, inverse_w, cos, grad_x, grad_weight = outs
        INVERSE_NORMS[backend](x, weight, inverse_x, inverse_w)
        SCALE[backend](x @ weight.t(), inverse_x, inverse_w, cos)
        torch.testing.assert_close(cos, reference(x, weight))
        grad_x.copy_(x.flip(1)), grad_weight.copy_(weight.flip(1))
        PROJECT[backend](x, weight, inverse_x, inverse_w, grad_x, grad_weight)
        for grad, vectors in ((grad_x, x), (grad_weight, weight)):
            along = (vectors.flip(1) * vectors).sum(1, keepdim=True) / vectors.square().sum(1, keepdim=True)
            torch.testing.assert_close(grad, vectors.flip(1) - along * vectors)
        assert_written(buffers)


@pytest.mark.parametrize("sizes", [(0, 5, 3), (4, 5, 0), (0, 5, 0)])
def test_empty(backend, device, sizes):
    x, weight = (t.requires_grad_() for t in example(*sizes, device=device))
    out = cosine_linear(x, weight)
    out.sum().backward()
    assert out.shape == (sizes[0], sizes[2])
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_more_than_two_to_the_31_elements():
    numpy = pytest.importorskip("numpy")
    # calloc gives pages of zeros that take no memory until they are written to
    vectors = torch.from_numpy(numpy.zeros((2**21 + 2, 1025), dtype=numpy.float32))
    vectors[-1, -1] = 2.0
    inverse = torch.empty(len(vectors))
    INVERSE_NORMS["cpu"](vectors, torch.ones(0, 1025), inverse, torch.empty(0))
    assert inverse[-1] == 0.5
    assert (inverse[:-1] == 1e12).all()


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.tuples(st.integers(1, 9), st.integers(2, 70), st.integers(1, 40)),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 99),
)
def test_any_size(sizes, dtype, seed):
    assert_as_good_as_pytorch(*example(*sizes, dtype, "cpu", seed))


# -------------------------------------------------------------------------------------------------------- determinism


def test_bit_equal_over_threads():
    """What is ours; the products are PyTorch's, and may depend on the number of threads."""
    x, weight = example(70, 2500, 3000)
    grad, product = x.flip(1), torch.randn(70, 3000)

    def run():
        inverse_x, inverse_w = torch.empty(70), torch.empty(3000)
        INVERSE_NORMS["cpu"](x, weight, inverse_x, inverse_w)
        cos, projected = torch.empty_like(product), grad.clone()
        SCALE["cpu"](product, inverse_x, inverse_w, cos)
        PROJECT["cpu"](x, weight, inverse_x, inverse_w, projected, None)
        return inverse_x, inverse_w, cos, projected

    assert_bit_equal(over_threads(run))


def test_bit_equal_over_repeats(backend, device):
    x, weight = example(3, 70, 9, device=device)
    first = cosines_and_grads(x, weight)
    for _ in range(3):
        assert all(map(torch.equal, cosines_and_grads(x, weight), first))
    assert torch.equal(cosine_linear(x, weight).double().cpu(), first[0])
