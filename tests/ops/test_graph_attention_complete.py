"""Attention over a complete graph: every backend against the dense float64 form, by docs/correctness.md."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlfast.functional import graph_attention
from mlfast.ops import _graph_attention_complete as route
from mlfast.ops import graph_attention as op
from mlfast.ops._graph_attention_complete import LAUNCH, LAUNCH_BACKWARD, new_merged, sorted_together
from tests.ops.policy import FLOATS, assert_bit_equal, assert_error, assert_written, guarded, over_threads

SLOPES = (0.2, 0.0, 1.0)
on_cpu = pytest.mark.parametrize("backend", ["cpu"], indirect=True)


@pytest.fixture
def backend(backend):
    if backend == "cuda":
        pytest.skip("graph attention has no CUDA C++ kernel")
    return backend


def example(shape, dtype=torch.float32, device="cpu", seed=0, spread=2.0, grid=None):
    """Values and scores; on a grid of 1 / ``grid`` many sums of scores are exactly 0."""
    g = torch.Generator().manual_seed(seed)
    value, src, dst = (torch.randn(size, generator=g) for size in (shape, shape[:2], shape[:2]))
    src, dst = src * spread, dst * spread
    if grid:
        src, dst = ((score * grid).round() / grid for score in (src, dst))
    return [t.to(device, dtype) for t in (value, src, dst)]


def complete_attention(value, src, dst, slope):
    """By the route of complete graphs, which on a GPU is taken by large ones alone."""
    if value.device.type == "cuda":
        return route.complete_attention("triton", value, src, dst, slope)
    return graph_attention(value, src, dst, negative_slope=slope)


def reference(value, src, dst, slope):
    return op.reference(value, src, dst, None, slope)


def out_and_grads(value, src, dst, slope=0.2, function=complete_attention):
    """The result and the three gradients for an uneven incoming gradient, in float64 on the CPU."""
    leaves = [t.detach().clone().requires_grad_() for t in (value, src, dst)]
    out = function(*leaves, slope)
    assert out.dtype == value.dtype and out.shape == value.shape
    incoming = torch.linspace(-1, 2, out.numel(), device=out.device).sin().to(out.dtype).view(out.shape)
    grads = torch.autograd.grad(out, leaves, incoming)
    assert [grad.dtype for grad in grads] == [leaf.dtype for leaf in leaves]
    return [t.detach().double().cpu() for t in (out, *grads)]


def assert_as_good_as_pytorch(value, src, dst, slope=0.2):
    """Result and gradients against float64, by the policy."""
    got = out_and_grads(value, src, dst, slope)
    plain = out_and_grads(value, src, dst, slope, reference)
    truth = out_and_grads(value.double(), src.double(), dst.double(), slope, reference)
    dtypes = value.dtype, value.dtype, src.dtype, dst.dtype
    for name, mine, theirs, exact, dtype in zip(("out", "value", "src", "dst"), got, plain, truth, dtypes, strict=True):
        assert_error(f"{name} of {tuple(value.shape)}, slope {slope}", mine, theirs, exact, dtype)


# ----------------------------------------------------------------------------------------------------- correctness


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("slope", SLOPES)
def test_formula(backend, device, dtype, slope):
    assert_as_good_as_pytorch(*example((40, 2, 18), dtype, device), slope)


@on_cpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(300, 3, 17), (150, 1, 600), (1000, 2, 8)])
def test_larger_shapes(backend, dtype, shape):
    assert_as_good_as_pytorch(*example(shape, dtype))


@on_cpu
@pytest.mark.parametrize("slope", SLOPES)
def test_errors_do_not_grow_with_the_graph(backend, slope):
    value, src, dst = example((2000, 1, 16))
    assert_as_good_as_pytorch(value, src, dst, slope)
    assert_as_good_as_pytorch(value + 100, src, dst, slope)  # the gradients by the scores are differences of large sums


def test_values_far_from_zero(backend, device):
    value, src, dst = example((70, 1, 3), device=device)
    assert_as_good_as_pytorch(value + 30, src, dst)


def test_values(backend, device):
    scores = [torch.tensor([[0.0], [math.log(2)]], device=device), torch.tensor([[0.0], [-1.0]], device=device)]
    value = torch.tensor([[[3.0]], [[6.0]]], device=device)
    out = complete_attention(value, *scores, 0.0)
    # LeakyReLU of slope 0 gives (0, ln 2) for the first row and (0, 0) for the second.
    torch.testing.assert_close(out.flatten().cpu(), torch.tensor([5.0, 4.5]))


def test_sums_that_are_zero_take_the_negative_slope(backend, device):
    for dtype in (torch.float32, torch.float64):
        assert_as_good_as_pytorch(*example((40, 1, 3), dtype, device, grid=1))
    value, src, _ = example((6, 1, 3), device=device)
    signed_zeros = torch.tensor([0.0, -0.0] * 3, device=device)[:, None]
    assert_as_good_as_pytorch(value, signed_zeros, signed_zeros.flip(0))
    assert_as_good_as_pytorch(value, src, -src)


def test_all_sums_on_one_side(backend, device):
    value, src, dst = example((40, 1, 5), device=device)
    for shift in (50, -50):
        assert_as_good_as_pytorch(value, src, dst + shift)
        assert_as_good_as_pytorch(value, src + shift, dst)
        grad_dst = out_and_grads(value, src + shift, dst)[3]
        if backend != "reference":  # where no sum changes its side, a shift of a row changes nothing
            assert (grad_dst == 0).all()


@pytest.mark.parametrize("spread", [30.0, 1e3, 1e20, 3e38])
def test_finite_scores_of_any_size(backend, device, spread):
    if backend == "reference" and spread > 1e38:
        pytest.skip("plain PyTorch overflows")
    value, src, dst = example((40, 1, 5), device=device)
    src, dst = src / src.abs().max() * spread, dst / dst.abs().max() * spread
    got = out_and_grads(value, src, dst)
    assert all(t.isfinite().all() for t in got)
    assert_as_good_as_pytorch(value, src, dst)


@on_cpu
@pytest.mark.parametrize("slope", SLOPES)
def test_double_scores_at_the_end_of_their_range(backend, slope):
    value, src, dst = example((40, 1, 5), torch.float64)
    largest = torch.finfo(torch.float64).max
    got = out_and_grads(value, src / src.abs().max() * largest, dst / dst.abs().max() * largest, slope)
    assert all(t.isfinite().all() for t in got)


@pytest.mark.parametrize("slope", [0.2, 0.0])
@pytest.mark.parametrize("of", [0, 1, 2])
@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_as_in_softmax(backend, device, special, of, slope):
    tensors = example((40, 1, 3), device=device)
    tensors[of][7] = special
    got = out_and_grads(*tensors, slope)
    expected = out_and_grads(*tensors, slope, reference)
    # Plain PyTorch's matrix product may say inf or NaN for an infinite value; where it is finite, so are we.
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.equal(mine.isfinite(), theirs.isfinite())
        torch.testing.assert_close(mine[mine.isfinite()], theirs[mine.isfinite()], rtol=1e-4, atol=1e-4)


def test_minus_infinity_masks_a_source(backend, device):
    value, src, dst = example((40, 1, 3), device=device)
    src[5:] = -torch.inf
    out, grad_value, *_ = out_and_grads(value, src, dst)
    few = reference(value[:5], src[:5], dst[:5], 0.2)
    torch.testing.assert_close(out[:5].float(), few.cpu())
    assert (grad_value[5:] == 0).all()


@pytest.mark.parametrize("slope", SLOPES)
def test_gradcheck(slope):
    tensors = [t.requires_grad_() for t in example((6, 2, 3), torch.float64)]
    assert torch.autograd.gradcheck(lambda *t: complete_attention(*t, slope), tensors)


def rows_directly(value, src, dst_rows, slope):
    """A few rows of one head, each over all sources."""
    logits = torch.nn.functional.leaky_relu(dst_rows[:, None] + src[None, :], slope)
    return logits.softmax(1) @ value


@on_cpu
def test_a_hundred_thousand_nodes(backend):
    rows = torch.tensor([0, 17, 50_000, 99_999])
    tensors = [t.requires_grad_() for t in example((100_000, 1, 16))]
    out = complete_attention(*tensors, 0.2)
    incoming = torch.zeros_like(out)
    incoming[rows] = torch.linspace(-1, 2, 64).view(4, 1, 16)
    grads = torch.autograd.grad(out, tensors, incoming)
    leaves = [t[:, 0].detach().double().requires_grad_() for t in tensors]
    exact = rows_directly(*leaves[:2], leaves[2][rows], 0.2)
    expected = torch.autograd.grad(exact, leaves, incoming[rows, 0].double())
    for mine, truth in ((out[rows], exact), *zip(grads, expected, strict=True)):
        bound = 4 * torch.finfo(torch.float32).eps * truth.abs().max().item()
        assert (mine[:, 0].double() - truth).abs().max().item() <= bound


MEMORY_CHILD = """
import resource, torch
from mlfast.functional import graph_attention
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def step(nodes):
    tensors = [torch.rand(nodes, *rest, requires_grad=True) for rest in ((1, 64), (1,), (1,))]
    incoming, before = torch.ones(nodes, 1, 64), peak()
    torch.autograd.grad(graph_attention(*tensors), tensors, incoming)
    return before
step(1000)
print(step(100_000), peak())
"""


@on_cpu
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_memory_grows_with_nodes_not_with_pairs(backend):
    child = subprocess.run([sys.executable, "-c", MEMORY_CHILD], capture_output=True, text=True, check=True)
    before, after = map(int, child.stdout.split())
    outputs = 2 * 100_000 * 64 * 4  # the result and the gradient by the values
    assert after - before <= outputs + 24 * 2**20


# ------------------------------------------------------------------------------------------------- shapes and layout


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 3, 2), (2, 1, 1), (32, 1, 15), (33, 1, 16), (65, 2, 17)])
def test_shapes_with_poisoned_memory(backend, device, shape):
    assert_as_good_as_pytorch(*example(shape, torch.float32, device))


@pytest.mark.parametrize("shape", [(0, 2, 3), (4, 0, 3), (4, 2, 0)])
def test_empty(backend, device, shape):
    tensors = [t.requires_grad_() for t in example(shape, device=device)]
    out = complete_attention(*tensors, 0.2)
    assert out.shape == shape
    for grad, tensor in zip(torch.autograd.grad(out.sum(), tensors), tensors, strict=True):
        assert torch.equal(grad, torch.zeros_like(tensor))


def test_layouts(backend, device):
    value, src, dst = example((20, 2, 4), device=device)
    expected = out_and_grads(value, src, dst)
    turned = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (value, src, dst)]
    wide = [torch.stack([t, t], dim=-1)[..., 0] for t in (value, src, dst)]
    for same in (turned, wide):
        torch.testing.assert_close(out_and_grads(*same), expected, rtol=1e-6, atol=1e-6)


def test_dtypes_of_scores(backend, device):
    value, src, dst = example((20, 2, 4), device=device)
    assert_as_good_as_pytorch(value, src.bfloat16(), dst.bfloat16())
    assert_as_good_as_pytorch(value, src.half(), dst)
    assert_as_good_as_pytorch(value.bfloat16(), src, dst)


def test_guard_bands(backend, device):
    if backend == "reference":
        pytest.skip("allocates its own outputs")

    def guarded_like(*tensors):
        return zip(*(guarded(t.shape, t.dtype, device) for t in tensors), strict=True)

    for shape, dtype in (((1, 1, 1), torch.float32), ((37, 2, 5), torch.float32), ((37, 2, 5), torch.bfloat16)):
        value, src, dst = example(shape, dtype, device)
        buffers, outs = guarded_like(value, *new_merged(value))
        sums = LAUNCH[backend](0.2, value, src, dst, *outs)
        grad_buffers, grads = guarded_like(value, src, dst)
        LAUNCH_BACKWARD[backend](0.2, src.dtype, sums, outs[0].contiguous(), value, *outs[1:], *grads)
        assert_written((*buffers, *grad_buffers))
        assert torch.equal(outs[1].sort(1).values, torch.arange(2 * shape[0], device=device).int().expand(shape[1], -1))


@on_cpu
def test_the_merged_order_is_that_of_plain_pytorch(backend):
    value, src, dst = example((200, 3, 1), torch.float64, grid=4)
    merged = new_merged(value)
    LAUNCH["cpu"](0.2, value, src, dst, torch.empty_like(value), *merged)
    order = sorted_together(src, dst)
    assert torch.equal(merged.order, order.int())
    sources = order >= 200
    gap = src.t().gather(1, (order - 200).clamp(min=0)) - src.amax(0)[:, None]
    weights = torch.stack([(0.2 * gap).exp(), gap.exp()])
    torch.testing.assert_close(merged.weights[:, sources], weights[:, sources])


@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 150), st.integers(1, 3), st.integers(1, 20)),
    dtype=st.sampled_from(FLOATS),
    slope=st.sampled_from((*SLOPES, 0.01, 0.9)),
    spread=st.sampled_from((0.01, 1.0, 20.0)),
    grid=st.sampled_from([None, 1, 8]),
    seed=st.integers(0, 99),
)
def test_any_shape(shape, dtype, slope, spread, grid, seed):
    assert_as_good_as_pytorch(*example(shape, dtype, "cpu", seed, spread, grid), slope)


# -------------------------------------------------------------------------------------------------------- determinism


@on_cpu
@pytest.mark.parametrize("shape", [(1500, 1, 300), (700, 4, 64)])
def test_bit_equal_over_repeats_and_threads(backend, shape):
    tensors = example(shape)
    assert_bit_equal(over_threads(lambda: out_and_grads(*tensors)))


def test_bit_equal_over_repeats(backend, device):
    tensors = example((40, 2, 5), device=device)
    first = out_and_grads(*tensors)
    assert all(map(torch.equal, out_and_grads(*tensors), first))
    with torch.no_grad():
        assert torch.equal(complete_attention(*tensors, 0.2).double().cpu(), first[0])
