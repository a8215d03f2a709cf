"""graph_attention as a citizen of PyTorch: autograd, torch.compile, export, autocast, errors."""

import numpy as np
import pytest
import torch

import mlfast
from mlfast.functional import graph_attention
from mlfast.graph import Graph


@pytest.fixture
def backend(backend):
    if backend == "cuda":
        pytest.skip("graph_attention has no CUDA C++ kernel")
    return backend


@pytest.fixture
def leaves(device):
    g = torch.Generator().manual_seed(0)
    shapes = (6, 2, 4), (6, 2), (6, 2)
    return [torch.randn(shape, generator=g).to(device).requires_grad_() for shape in shapes]


@pytest.fixture(params=["sparse", "dense", "complete"])
def graph(request, device):
    mask = torch.rand(6, 6, generator=torch.Generator().manual_seed(1)).to(device) < 0.4
    return {"sparse": Graph.from_dense(mask), "dense": mask, "complete": None}[request.param]


on_cpu = pytest.mark.parametrize("device", [torch.device("cpu")])


# ----------------------------------------------------------------------------------------------------------- autograd


def test_backward_twice_through_a_retained_graph(backend, leaves, graph):
    out = graph_attention(*leaves, graph, dropout=0.5)
    first = torch.autograd.grad(out.square().sum(), leaves, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(out.square().sum(), leaves)))


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3])
def test_only_the_gradients_that_are_needed(backend, leaves, graph, needs):
    expected = torch.autograd.grad(graph_attention(*leaves, graph).sum(), leaves)
    some = [t.detach().clone().requires_grad_(need) for t, need in zip(leaves, needs, strict=True)]
    out = graph_attention(*some, graph)
    assert out.requires_grad == any(needs)
    if any(needs):
        out.sum().backward()
    for leaf, need, grad in zip(some, needs, expected, strict=True):
        torch.testing.assert_close(leaf.grad, grad if need else None)


def test_inputs_stay_as_they_are(backend, leaves, graph):
    before = [t.detach().clone() for t in leaves]
    graph_attention(*leaves, graph).sum().backward()
    assert all(map(torch.equal, before, leaves))


def test_an_input_changed_after_forward_raises(backend, leaves, graph):
    out = graph_attention(*leaves, graph)
    with torch.no_grad():
        leaves[0].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@on_cpu
def test_second_derivative_says_what_is_missing(leaves, graph):
    with mlfast.use_backend("cpu"):
        grads = torch.autograd.grad(graph_attention(*leaves, graph).sum(), leaves, create_graph=True)
        for grad in grads:
            with pytest.raises(RuntimeError, match='use_backend\\("reference"\\)'):
                grad.sum().backward(retain_graph=True)
    with mlfast.use_backend("reference"):
        out = graph_attention(*leaves, graph).square().sum()
        torch.autograd.grad(out, leaves[0], create_graph=True)[0].sum().backward()


@on_cpu
def test_checkpointing_drops_the_same_weights(leaves, graph):
    expected = torch.autograd.grad(attend_twice(leaves, graph), leaves)
    checkpointed = torch.utils.checkpoint.checkpoint(attend_twice, leaves, graph, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(checkpointed, leaves), expected)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_seed_of_any_shape_with_one_number(shape):
    value, seed = torch.arange(24.0).view(4, 2, 3), torch.full(shape, 7)
    scores = value.sum(2), value.prod(2)
    expected = graph_attention(value, *scores, dropout=np.float32(0.5), seed=torch.tensor(7))
    torch.testing.assert_close(graph_attention(value, *scores, dropout=0.5, seed=seed), expected)
    with mlfast.use_backend("reference"):
        torch.testing.assert_close(graph_attention(value, *scores, dropout=0.5, seed=seed), expected)


def test_a_sparse_tensor_becomes_a_graph_as_the_message_says():
    matrix = torch.tensor([[0.0, 1, 0], [0, 0, 0], [1, 1, 0]])
    graph = Graph.from_edges(matrix.to_sparse().t().to_sparse_coo().coalesce().indices(), 3)
    assert torch.equal(graph.to_dense(), matrix > 0)


def attend_twice(leaves, graph):
    torch.manual_seed(0)
    value, *scores = leaves
    return graph_attention(graph_attention(value, *scores, graph, dropout=0.5), *scores, graph, dropout=0.5).sum()


# ------------------------------------------------------------------------------------------------ compile and export


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@on_cpu
def test_compile_whole(compiler, graph, device):
    torch._dynamo.reset()
    seed = torch.tensor([5])

    def step(value, src, dst):
        return graph_attention(value * 0.9, src.sigmoid(), dst, graph, dropout=0.2, seed=seed).square().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=compiler)
    for features in (3, 5):
        inputs = [torch.randn(6, 2, *more, requires_grad=True) for more in ((features,), (), ())]
        torch.testing.assert_close(compiled(*inputs), step(*inputs))
        got, expected = (torch.autograd.grad(f(*inputs), inputs) for f in (compiled, step))
        torch.testing.assert_close(got, expected)


@on_cpu
def test_compile_draws_new_masks(device):
    torch._dynamo.reset()
    attend = torch.compile(lambda *t: graph_attention(*t, dropout=0.5), fullgraph=True, backend="aot_eager")
    inputs = [torch.randn(6, 1, *more) for more in ((8,), (), ())]
    assert not torch.equal(attend(*inputs), attend(*inputs))


def test_opcheck(backend, leaves, graph, device):
    if backend == "reference":
        pytest.skip("has no custom op")
    seed, ops = torch.tensor([3], device=device), torch.ops.mlfast
    tensors = [t.detach() for t in leaves]
    if isinstance(graph, Graph):
        edges = graph.indptr, graph.indices, graph.indptr_t, graph.indices_t, graph.edges_t
        torch.library.opcheck(ops.graph_attention, (*leaves, *edges, 0.2, 0.1, seed))
        out, statistics = ops.graph_attention(*tensors, *edges, 0.2, 0.1, seed)
        backward = out, *tensors, statistics, *edges, 0.2, 0.1, seed
        torch.library.opcheck(ops.graph_attention_backward, backward)
    else:
        torch.library.opcheck(ops.graph_attention_dense, (*leaves, graph, 0.2, 0.1, seed))
        backward = torch.ones_like(tensors[0]), *tensors, graph, 0.2, 0.1, seed
        torch.library.opcheck(ops.graph_attention_dense_backward, backward)


class Attend(torch.nn.Module):
    def __init__(self, graph):
        super().__init__()
        self.neighbours = graph  # a traced module has a graph of its own

    def forward(self, value, src, dst):
        return graph_attention(value, src, dst, self.neighbours)


@on_cpu
def test_no_exporter_meets_a_custom_op(leaves, graph):
    inputs = tuple(t.detach() for t in leaves)
    model = Attend(graph)
    exported = torch.export.export(model, inputs)
    assert not [node for node in exported.graph.nodes if "mlfast" in str(node.target)]
    torch.testing.assert_close(exported.module()(*inputs), model(*inputs))
    traced = torch.jit.trace(model, inputs)
    assert "mlfast::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(*inputs), model(*inputs))


def test_autocast_leaves_the_dtype_and_the_precision(backend, leaves, graph, device):
    expected = graph_attention(*leaves, graph)
    with torch.autocast(device.type, torch.bfloat16):
        out = graph_attention(*leaves, graph)
        assert graph_attention(leaves[0].bfloat16(), *leaves[1:], graph).dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(value=[1.0]), TypeError, "value must be a tensor, got list"),
        (dict(value=torch.ones(3, 2, 4).int()), TypeError, r"value must be bfloat16.*torch.int32; pass value.float"),
        (
            dict(value=torch.ones(3, 4)),
            ValueError,
            r"value must be \[K, H, F\].*got \[3, 4\]; .* pass value\[:, None\]",
        ),
        (dict(score_src=torch.ones(3)), ValueError, r"score_src must be \[K, H\], \[3, 2\], got \[3\]"),
        (dict(score_dst=torch.ones(2, 3)), ValueError, r"score_dst must be \[K, H\], \[3, 2\], got \[2, 3\]"),
        (dict(score_dst=torch.ones(3, 2, device="meta")), ValueError, "score_dst must be on the device of value, cpu"),
        (
            dict(graph=torch.ones(2, 9).long()),
            ValueError,
            r"graph must be \[K, K\], \[3, 3\].* pass mlfast.Graph.from_e",
        ),
        (dict(graph=torch.ones(3, 3).cfloat()), TypeError, "graph must be bool, integer or float"),
        (
            dict(graph=torch.eye(3).to_sparse()),
            TypeError,
            "graph must be a dense tensor, .* pass mlfast.Graph.from_edges",
        ),
        (dict(graph=[[1]]), TypeError, "graph must be None, a tensor or an mlfast.Graph, got list"),
        (dict(graph=Graph.from_dense(torch.eye(4))), ValueError, r"graph must have the 3 nodes of value, got Graph\(4"),
        (dict(negative_slope=-0.1), ValueError, "negative_slope must be at least 0, got -0.1"),
        (dict(dropout=1.0), ValueError, r"dropout must be in \[0, 1\), got 1.0"),
        (dict(dropout=0.5, seed=7), TypeError, "seed must be an int64 tensor of one element, got 7"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = dict(value=torch.ones(3, 2, 4), score_src=torch.ones(3, 2), score_dst=torch.ones(3, 2)) | change
    with pytest.raises(error, match=message):
        graph_attention(**arguments)
