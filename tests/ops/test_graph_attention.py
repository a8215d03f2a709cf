"""graph_attention: every backend and route against float64, by the policy of docs/correctness.md."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mlfast
from mlfast.functional import graph_attention
from mlfast.graph import Graph
from mlfast.ops import _graph_attention_dense as dense
from mlfast.ops import _graph_attention_sparse as sparse
from mlfast.ops.graph_attention import keep_factors, philox
from tests.ops.policy import FLOATS, assert_bands, assert_bit_equal, assert_error, assert_written, guarded, over_threads

ROUTES = ("sparse", "mask", "dense", "complete")  # a mask takes the sparse or the dense kernels, by its density
SEED = torch.tensor([12345678901234])


@pytest.fixture
def backend(backend):
    """The backends that have a kernel; that a request for the other one raises is tested in test_backends.py."""
    if backend == "cuda":
        pytest.skip("graph_attention has no CUDA C++ kernel")
    return backend


@pytest.fixture(params=ROUTES)
def route(request):
    with going(request.param):
        yield request.param


def going(route):
    """While it lives, masks of any density go the dense route if that is the one."""
    return patch.object(dense, "dense_from", (lambda nodes, listed: 0.0) if route == "dense" else dense.dense_from)


def example(nodes, heads=1, features=8, density=0.4, dtype=torch.float32, device="cpu", seed=0, spread=2.0):
    """Value, scores and a mask; the first row has no neighbours, the last node is nobody's neighbour."""
    g = torch.Generator().manual_seed(seed)
    value = torch.randn(nodes, heads, features, generator=g).to(device, dtype)
    scores = (torch.randn(2, nodes, heads, generator=g) * spread).to(device, dtype)
    mask = torch.rand(nodes, nodes, generator=g) < density
    mask[:1], mask[:, -1:] = False, False
    return value, *scores, mask.to(device)


def as_graph(mask, route):
    """What graph_attention takes to go this route."""
    if route == "sparse":
        graph = Graph.from_dense(mask)
        graph.mask = None  # whatever its density
        return graph
    return None if route == "complete" else mask


def attended_and_grads(value, score_src, score_dst, graph, **options):
    """The result and all gradients for an uneven incoming gradient, in float64 on the CPU."""
    leaves = [t.detach().clone().requires_grad_() for t in (value, score_src, score_dst)]
    out = graph_attention(*leaves, graph, **options)
    assert out.dtype == value.dtype
    assert out.shape == value.shape
    incoming = torch.linspace(-1, 2, out.numel(), device=out.device).to(out.dtype).view(out.shape)
    return [t.detach().double().cpu() for t in (out, *torch.autograd.grad(out, leaves, incoming))]


def assert_as_good_as_pytorch(value, score_src, score_dst, mask, route, **options):
    """Result and gradients against float64, by the policy."""
    tensors = value, score_src, score_dst
    got = attended_and_grads(*tensors, as_graph(mask, route), **options)
    with mlfast.use_backend("reference"):
        mask = None if route == "complete" else mask
        plain = attended_and_grads(*tensors, mask, **options)
        truth = attended_and_grads(*(t.double() for t in tensors), mask, **options)
    dtypes = value.dtype, value.dtype, score_src.dtype, score_dst.dtype
    names = "out", "value", "score_src", "score_dst"
    for name, mine, theirs, exact, dtype in zip(names, got, plain, truth, dtypes, strict=True):
        assert_error(f"{name} of {tuple(value.shape)}, {route}", mine, theirs, exact, dtype)


# ----------------------------------------------------------------------------------------------------- correctness


@pytest.mark.parametrize("dtype", FLOATS)
def test_formula(backend, device, route, dtype):
    for seed, (nodes, heads, features) in enumerate([(1, 1, 1), (6, 2, 5), (7, 1, 300)]):
        case = example(nodes, heads, features, dtype=dtype, device=device, seed=seed)
        assert_as_good_as_pytorch(*case, route)
        assert_as_good_as_pytorch(*case, route, negative_slope=0.0)
        assert_as_good_as_pytorch(*case, route, dropout=0.3, seed=SEED.to(device))


@pytest.mark.parametrize("density", [0.0, 0.03, 0.3, 1.0])
def test_sizes_and_densities(route, density):
    for nodes, heads, features in ((80, 1, 37), (150, 3, 16), (600, 1, 9)):
        case = example(nodes, heads, features, density)
        assert_as_good_as_pytorch(*case, route)
        assert_as_good_as_pytorch(*case, route, dropout=0.5, seed=SEED, negative_slope=1.5)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
def test_scores_of_another_dtype(backend, device, route, dtypes):
    value, src, dst, mask = example(7, 2, 4, device=device)
    assert_as_good_as_pytorch(value.to(dtypes[0]), src.to(dtypes[1]), dst.to(dtypes[1]), mask, route)


def test_the_paper_s_layer(backend, device, route):
    """The numbers that the graph branch of the released code gave, the activation outside."""
    x = torch.tensor([[1, 0], [0, 1], [0.5, -1]], device=device)
    weight, a = torch.tensor([[1, -0.5], [0.5, 2]], device=device), torch.tensor([0.3, -0.2, 0.1, 0.4], device=device)
    adjacency = torch.tensor([[1, 0, 0], [0.25, 1, 0], [0.1, 0.2, 1]], device=device)
    if route == "complete":
        pytest.skip("the graph is not complete")
    value = x @ weight
    dst, src = (value @ half[:, None] for half in a.split(2))
    out = torch.nn.functional.elu(graph_attention(value[:, None], src, dst, as_graph(adjacency, route))).flatten(1)
    expected = torch.tensor([[1, -0.3934693], [0.6692485, 1.1537579], [0.5420786, 0.7618276]])
    torch.testing.assert_close(out.cpu(), expected, rtol=0, atol=2e-7)


@pytest.mark.parametrize("spread", [1e-3, 30.0, 1e3, 1e18])
def test_any_finite_scores(route, spread):
    """No overflow, whether exponentials are factorised or not, and however far a row is below the largest score."""
    value, src, dst, mask = example(40, 2, 8, spread=spread)
    src[3], dst[5] = 1.7 * spread, -50 * spread
    assert_as_good_as_pytorch(value, src, dst, mask, route)


def test_nan_and_infinity_as_in_pytorch(backend, device, route):
    for number in (torch.nan, torch.inf, -torch.inf):
        value, src, dst, mask = example(6, 1, 3, 0.5, device=device)
        mask[2, 4] = True
        src[4], dst[5] = number, -number
        got = attended_and_grads(value, src, dst, as_graph(mask, route))
        with mlfast.use_backend("reference"):
            expected = attended_and_grads(value, src, dst, None if route == "complete" else mask)
        torch.testing.assert_close(got, expected, equal_nan=True, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("nodes", [40, 300])
@pytest.mark.parametrize("share", [0.05, 0.95])
def test_true_may_be_any_byte_but_0(nodes, share):
    g = torch.Generator().manual_seed(0)
    *tensors, _ = example(nodes, 1, 8)
    mask = torch.rand(nodes, nodes, generator=g) < share
    for byte in (2, 3, 128, 255):
        view = (mask.to(torch.uint8) * byte).view(torch.bool)
        for got, expected in zip(attended_and_grads(*tensors, view), attended_and_grads(*tensors, mask), strict=True):
            assert torch.equal(got, expected)


def test_a_seed_changed_before_backward_raises(route):
    *leaves, mask = example(6)
    seed = SEED.clone()
    leaves = [leaf.requires_grad_() for leaf in leaves]
    out = graph_attention(*leaves, as_graph(mask, route), dropout=0.4, seed=seed)
    seed += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck(route, dropout):
    *tensors, mask = example(6, 2, 3, dtype=torch.float64)
    graph = as_graph(mask, route)

    def attend(*leaves):
        return graph_attention(*leaves, graph, dropout=dropout, seed=SEED)

    assert torch.autograd.gradcheck(attend, [t.requires_grad_() for t in tensors])


# ------------------------------------------------------------------------------------------------------------ dropout


@pytest.mark.parametrize(
    ("key", "counter", "word"),
    [
        (0, (0, 0, 0, 0), 0x6627E8D5),
        (-1, (0xFFFFFFFF,) * 4, 0x408F276D),
        (0x299F31D0A4093822, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0xD16CFE09),
    ],
)
def test_philox_is_the_published_one(key, counter, word):
    """The known answers of the authors' library, Random123."""
    assert philox(torch.tensor(key), *map(torch.tensor, counter)) == word


def test_dropout_drops_its_share_and_keeps_the_mean():
    keep = keep_factors(torch.Size((4, 200, 200)), 0.3, SEED, torch.float64)
    share = (keep == 0).double().mean().item()
    assert abs(share - 0.3) < 5 * (0.3 * 0.7 / keep.numel()) ** 0.5
    assert set(keep.unique().tolist()) == {0.0, 1 / 0.7}
    assert (keep[0] != keep[1]).any() and (keep[0] != keep[0].t()).any()


def test_dropout_is_a_function_of_the_place(backend, device):
    """The mask is the same in every route and graph: with value the identity, weights can be read off."""
    nodes, seed = 7, SEED.to(device)
    zeros = torch.zeros(nodes, 1, device=device)
    mask = torch.rand(nodes, nodes, generator=torch.Generator().manual_seed(0)).to(device) < 0.6
    value = torch.eye(nodes, device=device)[:, None]
    keep = keep_factors(torch.Size((1, nodes, nodes)), 0.5, seed, torch.float32)[0] > 0
    for route in ROUTES:
        with going(route):
            weights = graph_attention(value, zeros, zeros, as_graph(mask, route), dropout=0.5, seed=seed)[:, 0]
        assert torch.equal(weights > 0, keep if route == "complete" else keep & mask)


def test_manual_seed_reproduces_dropout(backend, device, route):
    *tensors, mask = example(8, device=device)
    graph = as_graph(mask, route)

    def draw(number):
        torch.manual_seed(number)
        return graph_attention(*tensors, graph, dropout=0.5)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    torch.manual_seed(1)
    assert not torch.equal(draw(1), graph_attention(*tensors, graph, dropout=0.5))


# ------------------------------------------------------------------------------------------------- shapes and layout


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 1), (5, 1, 17), (3, 2, 257)])
def test_shapes_with_poisoned_memory(backend, device, route, shape):
    for density in (0.0, 0.5):
        assert_as_good_as_pytorch(*example(*shape, density, device=device), route)


def test_layouts(backend, device, route):
    value, src, dst, mask = example(6, 2, 5, device=device)
    graph = as_graph(mask, route)
    expected = attended_and_grads(value, src, dst, graph)
    wide = torch.full((9, 6, 4), torch.nan, device=device)
    wide[2:7, :, 1:3] = value.permute(2, 0, 1)
    strided = wide[2:7, :, 1:3].permute(1, 2, 0), src.t().contiguous().t(), torch.stack([dst, dst], 2)[:, :, 1]
    leaves = [t.requires_grad_() for t in strided]
    out = graph_attention(*leaves, graph)
    torch.testing.assert_close(out.double().cpu(), expected[0])
    incoming = torch.linspace(-1, 2, out.numel(), device=device).view(out.shape)
    turned = incoming.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    grads = torch.autograd.grad(out, leaves, turned, retain_graph=True)
    torch.testing.assert_close([g.double().cpu() for g in grads], expected[1:])
    ones = torch.ones((), device=device).expand(out.shape)
    grads = torch.autograd.grad(out, leaves, ones, retain_graph=True)
    torch.testing.assert_close(grads, torch.autograd.grad(out, leaves, ones.contiguous()))


@pytest.mark.parametrize("kind", [torch.uint8, torch.int64, torch.float32, torch.bfloat16])
def test_kinds_of_mask(backend, device, kind):
    *tensors, mask = example(6, device=device)
    numbers = torch.where(mask, 3, 0).to(kind) if kind == torch.uint8 else torch.where(mask, 3, -1).to(kind)
    expected = graph_attention(*tensors, mask)
    assert torch.equal(graph_attention(*tensors, numbers), expected)
    assert torch.equal(graph_attention(*tensors, numbers.t().contiguous().t()), expected)


@pytest.mark.parametrize("shape", [(0, 2, 3), (4, 0, 3), (4, 2, 0), (0, 0, 0)])
def test_empty(backend, device, route, shape):
    value = torch.zeros(shape, device=device, requires_grad=True)
    src, dst = (torch.ones(shape[:2], device=device, requires_grad=True) for _ in range(2))
    mask = torch.ones(shape[:1] * 2, device=device)
    out = graph_attention(value, src, dst, as_graph(mask, route))
    out.sum().backward()
    assert out.shape == shape == value.grad.shape
    assert torch.equal(src.grad, torch.zeros_like(src)) and torch.equal(dst.grad, torch.zeros_like(dst))


def test_guard_bands(backend, device):
    if backend == "reference":
        pytest.skip("allocates its own outputs")
    for nodes, heads, features in ((1, 1, 1), (5, 3, 7), (9, 2, 65)):
        *tensors, mask = example(nodes, heads, features, device=device)
        graph = Graph.from_dense(mask)
        edges = graph.indptr, graph.indices, graph.indptr_t, graph.indices_t, graph.edges_t
        shapes = [(nodes, heads, features), (2, nodes, heads)]
        shapes += [(nodes, heads, features), (graph.num_edges, heads), (nodes, heads), (nodes, heads)]
        buffers, outs = zip(*(guarded(shape, device=device) for shape in shapes), strict=True)
        sparse.LAUNCH[backend](*tensors, edges, (0.2, 0.1), SEED.to(device), *outs[:2])
        grad_out = torch.ones_like(tensors[0])
        sparse.LAUNCH_BACKWARD[backend](*tensors, edges, (0.2, 0.1), SEED.to(device), outs[1], grad_out, *outs[2:])
        src, dst = (t.t().contiguous() for t in tensors[1:])
        shapes = [(heads, 1, nodes)] * 2 + [(heads, nodes)] * 2
        more, blocks = zip(*(guarded(shape, device=device) for shape in shapes), strict=True)
        dense.WEIGHTS[backend](src, dst, (0.2, 0.1), SEED.to(device), nodes - 1, mask, blocks[0])
        dense.BACKWARD[backend](src, dst, (0.2, 0.1), SEED.to(device), nodes - 1, *blocks)
        assert_written(buffers)
        assert_bands(more)  # a block of rows writes only its share of the gradients by the scores


def test_blocks_of_rows(monkeypatch):
    *tensors, mask = example(50, 2, 9)
    monkeypatch.setattr(dense, "dense_from", lambda nodes, listed: 0.0)
    expected = attended_and_grads(*tensors, mask)
    monkeypatch.setattr(dense, "BLOCK", 700)  # 7 rows at a time, and 1 at the end
    torch.testing.assert_close(attended_and_grads(*tensors, mask), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("nodes", [3, 7, 8, 21])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.4])
def test_the_edges_of_a_mask(nodes, density):
    """The same as those of a Graph; the mask's rows are not aligned where there are 3, 7 or 21 nodes."""
    mask = torch.rand(nodes, nodes, generator=torch.Generator().manual_seed(0)) < density
    graph = Graph.from_dense(mask)
    expected = graph.indptr, graph.indices, graph.indptr_t, graph.indices_t, graph.edges_t
    assert graph.density < dense.dense_from(nodes, listed=False)
    for got, tensor in zip(dense.few_edges("cpu", mask.t().contiguous().t()), expected, strict=True):
        assert torch.equal(got, tensor)
    assert dense.few_edges("cpu", torch.ones(nodes, nodes, dtype=torch.bool)) is None


@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 30), st.integers(1, 4), st.integers(1, 40)),
    density=st.floats(0, 1),
    dtype=st.sampled_from(FLOATS),
    route=st.sampled_from(ROUTES),
    slope=st.sampled_from([0.0, 0.2, 1.0, 2.0]),
    dropout=st.sampled_from([0.0, 0.1, 0.9]),
    seed=st.integers(0, 99),
)
def test_any_shape(shape, density, dtype, route, slope, dropout, seed):
    case = example(*shape, density, dtype, seed=seed)
    with going(route):
        assert_as_good_as_pytorch(*case, route, negative_slope=slope, dropout=dropout, seed=SEED + seed)


# -------------------------------------------------------------------------------------------------------- determinism


def test_bit_equal_over_repeats_and_threads(route):
    *tensors, mask = example(300, 2, 64, 0.2)
    graph = as_graph(mask, route)
    results = over_threads(lambda: attended_and_grads(*tensors, graph, dropout=0.1, seed=SEED))
    if route in ("sparse", "mask"):
        assert_bit_equal(results)
    for result in results[1:]:  # the products of matrices are PyTorch's, whose library may split sums by threads
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-5)


def test_bit_equal_over_repeats(backend, device, route):
    *tensors, mask = example(7, 2, 20, device=device)
    graph = as_graph(mask, route)
    first = attended_and_grads(*tensors, graph)
    for _ in range(3):
        assert all(map(torch.equal, attended_and_grads(*tensors, graph), first))


def test_a_mask_on_the_cpu_whatever_the_default_device_is():
    value, scores, mask = torch.randn(6, 2, 3), torch.randn(6, 2), torch.eye(6, dtype=torch.bool)
    with torch.device("meta"):
        out = graph_attention(value, scores, scores, mask)
    torch.testing.assert_close(out, value)  # each attends to itself alone
