"""group_linear: every backend against float64, by the policy of docs/correctness.md."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import mlfast
from mlfast.functional import group_linear
from mlfast.ops.group_linear import LAUNCH, LAUNCH_BACKWARD, Sizes, computing_dtype, reference
from tests.ops.policy import FLOATS, assert_bit_equal, assert_error, assert_written, guarded, over_threads

# batch, groups, features, slots, classes: one slot, a few, more than a block; classes that fill the slots, that crop
# the last group, and that leave a group without any
SIZES = [(5, 3, 20, 1, 3), (5, 3, 37, 7, 19), (3, 3, 24, 18, 20)]


@pytest.fixture
def backend(backend):
    """The backends that have a kernel; that a request for the other one raises is tested in test_backends.py."""
    if backend == "cuda":
        pytest.skip("group_linear has no CUDA C++ kernel")
    return backend


@pytest.fixture(params=[False, True], ids=["product", "cosine"])
def cosine(request):
    return request.param


def example(size, dtype=torch.float32, device="cpu", weight_dtype=None, bias=True, seed=0):
    """x, weight, bias and the number of classes; lengths vary from row to row."""
    batch, groups, features, slots, classes = size
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, groups, features, generator=g) * torch.rand(batch, groups, 1, generator=g) * 3
    weight = torch.randn(groups, features, slots, generator=g) * torch.rand(groups, 1, slots, generator=g)
    offset = torch.randn(classes, generator=g).to(device) if bias else None
    return x.to(device, dtype), weight.to(device, weight_dtype or dtype), offset, classes


def output_and_grads(x, weight, bias, classes, cosine):
    """The result and all gradients for an uneven incoming gradient, in float64 on the CPU."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
    out = group_linear(*leaves, num_classes=classes, cosine=cosine)
    incoming = torch.linspace(-0.5, 2, out.numel(), device=out.device).bfloat16()  # the same in every dtype
    incoming = incoming.to(out.dtype).view(out.shape)
    grads = torch.autograd.grad(out, leaves, incoming)
    assert [grad.dtype for grad in grads] == [leaf.dtype for leaf in leaves]
    return [t.detach().double().cpu() for t in (out, *grads)], out.dtype


def assert_as_good_as_pytorch(x, weight, bias, classes, cosine):
    """Result and gradients against float64, by the policy."""
    got, out_dtype = output_and_grads(x, weight, bias, classes, cosine)
    with mlfast.use_backend("reference"):
        plain, plain_dtype = output_and_grads(x, weight, bias, classes, cosine)
        double = (None if t is None else t.double() for t in (x, weight, bias))
        truth, _ = output_and_grads(*double, classes, cosine)
        # An output is a sum of terms that cancel: rounding is measured by their sizes.
        sizes = (None if t is None else t.double().abs() for t in (x, weight, bias))
        size_of_terms = output_and_grads(*sizes, classes, cosine)[0][0].max().item() if x.numel() else 0.0
    assert out_dtype == plain_dtype
    dtypes = out_dtype, *(t.dtype for t in (x, weight, bias) if t is not None)
    names = ("out", "x", "weight", "bias")[: len(dtypes)]
    for name, mine, theirs, exact, dtype in zip(names, got, plain, truth, dtypes, strict=True):
        floor = 4 * torch.finfo(dtype).eps * size_of_terms + 1e-12 if name == "out" else None
        assert_error(f"{name} of {tuple(x.shape)}", mine, theirs, exact, dtype, floor)


# ----------------------------------------------------------------------------------------------------- correctness


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [*SIZES, (9, 3, 70, 2, 5), (3, 2, 40, 4, 7), (5, 2, 72, 12, 20)])
def test_formula(backend, device, size, dtype, cosine):
    for bias in (False, True):
        assert_as_good_as_pytorch(*example(size, dtype, device, bias=bias), cosine)


@pytest.mark.parametrize("size", [(6, 3, 768, 7, 21), (33, 2, 300, 97, 190), (4, 2, 2048, 1, 2)])
def test_formula_of_usual_sizes(size, cosine):
    with mlfast.use_backend("cpu"):
        for dtype in FLOATS:
            assert_as_good_as_pytorch(*example(size, dtype), cosine)


@pytest.mark.parametrize("dtypes", [
    (torch.bfloat16, torch.float32), (torch.float32, torch.float16), (torch.float64, torch.float32),
    (torch.bfloat16, torch.float16), (torch.float16, torch.float64), (torch.bfloat16, torch.float64),
    (torch.float64, torch.bfloat16),
])  # fmt: skip
@pytest.mark.parametrize("size", SIZES[1:])
def test_dtypes_of_x_and_weight_may_differ(backend, device, size, dtypes, cosine):
    assert_as_good_as_pytorch(*example(size, dtypes[0], device, dtypes[1]), cosine)


def test_values(backend, device):
    x = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]], device=device)
    weight = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[5.0, 7.0], [5.0, 7.0]]], device=device)
    bias = torch.tensor([1.0, 0.0, -1.0], device=device)
    assert group_linear(x, weight, bias, num_classes=3).tolist() == [[4.0, 8.0, 9.0]]
    cosines = group_linear(x, weight, num_classes=4, cosine=True)
    torch.testing.assert_close(cosines.cpu(), torch.tensor([[0.6, 0.8, 0.5**0.5, 0.5**0.5]]))


def test_the_reference_is_the_loop_of_the_released_code():
    """A linear layer per group on normalised vectors, its outputs side by side, cut off after the last class."""
    x, weight, bias, classes = example(SIZES[1], torch.float64)
    columns = [F.normalize(x[:, i], dim=1) @ F.normalize(weight[i], dim=0) for i in range(x.shape[1])]
    expected = torch.cat(columns, dim=1)[:, :classes] + bias
    torch.testing.assert_close(reference(x, weight, bias.double(), num_classes=classes, cosine=True), expected)


@pytest.mark.parametrize("slots", [3, 12])
def test_gradient_of_slots_without_a_class_is_zero(backend, device, slots, cosine):
    x, weight, _, _ = example((4, 4, 20, slots, 0), device=device)
    x.requires_grad_(), weight.requires_grad_()
    group_linear(x, weight, num_classes=slots + 2, cosine=cosine).sum().backward()
    assert (weight.grad[1, :, :2] != 0).any() and (weight.grad[1, :, 2:] == 0).all()
    assert (weight.grad[2:] == 0).all() and (x.grad[:, 2:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [0.0, 1e-13, 0.99e-12, 1.01e-12, 1e-11])
@pytest.mark.parametrize("size", SIZES[1:])
def test_short_vectors(backend, device, size, dtype, length):
    """Below 1e-12 the length is constant, and so the gradient is that of a product."""
    x, weight, bias, classes = example(size, dtype, device)
    x[1], weight[0, :, 2] = F.normalize(x[1], dim=-1) * length, F.normalize(weight[0, :, 2], dim=0) * length
    got, _ = output_and_grads(x, weight, bias, classes, True)
    with mlfast.use_backend("reference"):
        expected, _ = output_and_grads(x.double(), weight.double(), bias.double(), classes, True)
    for mine, truth in zip(got, expected, strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, truth, rtol=1e-4, atol=1e-6 * truth.abs().max().item())
    if length == 0:
        assert torch.equal(got[0][1], bias.double().cpu())


def test_nan_and_infinity_as_in_pytorch(backend, device, cosine):
    for value in (torch.nan, torch.inf):
        x, weight, bias, classes = example(SIZES[1], device=device)
        x[2, 1, 3] = weight[0, 5, 2] = value
        got, _ = output_and_grads(x, weight, bias, classes, cosine)
        with mlfast.use_backend("reference"):
            expected, _ = output_and_grads(x, weight, bias, classes, cosine)
        for mine, theirs in zip(got, expected, strict=True):
            assert torch.equal(mine.isfinite(), theirs.isfinite())


def test_gradcheck(cosine):
    x, weight, bias, classes = (t.double().requires_grad_() if torch.is_tensor(t) else t for t in example(SIZES[1]))
    assert torch.autograd.gradcheck(
        lambda *leaves: group_linear(*leaves, num_classes=classes, cosine=cosine), (x, weight, bias)
    )


# ------------------------------------------------------------------------------------------------- shapes and layout


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("size", [(1, 1, 1, 1, 1), (2, 1, 130, 2, 2), (1, 2, 15, 33, 34), (33, 1, 9, 2, 2)])
def test_sizes_with_poisoned_memory(backend, device, size, cosine):
    if cosine and size[2] == 1:
        pytest.skip("the gradients are 0: what is left is rounding")
    assert_as_good_as_pytorch(*example(size, torch.float64, device), cosine)
    assert_as_good_as_pytorch(*example(size, torch.bfloat16, device), cosine)


def test_layouts(backend, device, cosine):
    x, weight, bias, classes = example(SIZES[1], device=device)
    expected, _ = output_and_grads(x, weight, bias, classes, cosine)
    by_group = x.transpose(0, 1).contiguous().transpose(0, 1)
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.full((6, 5, 60), torch.nan, device=device)
    wide[1:, 1:4, 9:46] = x
    flipped_weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    for same_x in (by_group, turned, wide[1:, 1:4, 9:46]):
        got, _ = output_and_grads(same_x, flipped_weight, bias, classes, cosine)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    one = x[:1].expand(5, -1, -1)
    results = [group_linear(same, weight, num_classes=classes, cosine=cosine) for same in (one, one.contiguous())]
    torch.testing.assert_close(*results)


def test_the_gradient_has_the_layout_of_x(backend, device, cosine):
    if backend == "reference":
        pytest.skip("leaves the layout to PyTorch")
    x, weight, _, classes = example(SIZES[1], device=device)
    for layout in (x, x.transpose(0, 1).contiguous().transpose(0, 1)):
        leaf = layout.detach().requires_grad_()
        (grad,) = torch.autograd.grad(group_linear(leaf, weight, num_classes=classes, cosine=cosine).sum(), leaf)
        assert grad.stride() == layout.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(1, 1, 1, 1, 1), (5, 3, 37, 7, 19), (5, 3, 37, 12, 31)])
def test_guard_bands(backend, device, size, dtype, cosine):
    if backend == "reference":
        pytest.skip("allocates its own outputs")
    batch, groups, _, slots, classes = size
    x, weight, bias, _ = example(size, dtype, device)
    sizes, computing = Sizes(*size, cosine), computing_dtype(dtype)
    saved_shapes = ((batch, classes), (batch, groups), (groups, slots)) if cosine else ()
    shapes = (batch, classes), *saved_shapes
    buffers, (out, *saved) = zip(*(guarded(shape, computing, device) for shape in shapes), strict=True)
    saved = saved or [None] * 3
    LAUNCH[backend](sizes, x, weight, bias, out, *saved)
    grad_buffers, grads = zip(*(guarded(t.shape, dtype, device) for t in (x, weight)), strict=True)
    LAUNCH_BACKWARD[backend](sizes, out.contiguous(), x, weight, *saved, *grads)
    assert_written((*buffers, *grad_buffers))


def test_empty_batch(backend, device, cosine):
    x, weight, bias, classes = example((0, 3, 5, 2, 5), device=device)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    out = group_linear(*leaves, num_classes=classes, cosine=cosine)
    out.sum().backward()
    assert out.shape == (0, 5) and x.grad.shape == x.shape
    assert torch.equal(weight.grad, torch.zeros_like(weight)) and torch.equal(bias.grad, torch.zeros_like(bias))


def test_more_than_two_to_the_31_elements(cosine):
    numpy = pytest.importorskip("numpy")
    # calloc gives pages of zeros that take no memory until they are written to; rows far apart keep the reading short
    storage = torch.from_numpy(numpy.zeros(2**31 + 2**20, dtype=numpy.float16))
    x = storage.as_strided((3, 2, 16), (2**30, 2**19, 1))
    x[-1, -1] = 2.0
    out = group_linear(x, torch.ones(2, 16, 3), num_classes=6, cosine=cosine)
    assert out[-1].tolist() == [0.0] * 3 + [1.0 if cosine else 32.0] * 3
    assert out.count_nonzero() == 3


@settings(deadline=None, max_examples=60)
@given(
    size=st.tuples(st.integers(1, 10), st.integers(1, 4), st.integers(1, 300), st.integers(1, 20)),
    used=st.floats(0.01, 1.0),
    dtype=st.sampled_from(FLOATS),
    cosine=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_size(size, used, dtype, cosine, bias, seed):
    batch, groups, features, slots = size
    if cosine:  # in few dimensions some vectors are nearly parallel: their gradients are what rounding leaves
        features = max(features, 32)
    classes = max(1, int(groups * slots * used))
    assert_as_good_as_pytorch(*example((batch, groups, features, slots, classes), dtype, bias=bias, seed=seed), cosine)


# -------------------------------------------------------------------------------------------------------- determinism


def test_bit_equal_over_repeats_and_threads(cosine):
    inputs = example((30, 9, 768, 7, 60))
    assert_bit_equal(over_threads(lambda: output_and_grads(*inputs, cosine)[0]))


def test_bit_equal_over_repeats(backend, device, cosine):
    inputs = example(SIZES[1], device=device)
    first, _ = output_and_grads(*inputs, cosine)
    for _ in range(3):
        assert all(map(torch.equal, output_and_grads(*inputs, cosine)[0], first))
    without_grad = group_linear(*inputs[:3], num_classes=inputs[3], cosine=cosine)
    torch.testing.assert_close(without_grad.double().cpu(), first[0], rtol=0, atol=0)
