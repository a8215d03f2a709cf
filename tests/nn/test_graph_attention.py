"""GraphAttention: against torch_geometric's layer with the same weights, and as a module."""

import copy

import pytest
import torch

import mlfast
from mlfast.graph import Graph
from mlfast.nn import GraphAttention
from mlfast.ops._graph_attention_scores import value_and_scores
from tests.ops.policy import assert_bit_equal, assert_error, over_threads

EDGES = torch.randint(12, (2, 40), generator=torch.Generator().manual_seed(0)).unique(dim=1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("size", [7, 20])  # fewer than nodes, and more
def test_is_gatconv(size, heads, bias):
    geometric = pytest.importorskip("torch_geometric.nn", reason="torch_geometric is not installed")
    torch.manual_seed(0)
    options = dict(add_self_loops=False, negative_slope=0.3, bias=bias)
    theirs = geometric.GATConv(size, 5, heads, **options).double()
    layer = GraphAttention(size, 5, heads, negative_slope=0.3, bias=bias).double()
    layer.load_state_dict(theirs.state_dict())
    inputs = [torch.randn(12, size, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    inputs[1].data.copy_(inputs[0].data)
    graph = Graph.from_edges(EDGES, 12)
    out, expected = layer(inputs[0], graph), theirs(inputs[1], EDGES)
    torch.testing.assert_close(out, expected)
    incoming = torch.randn_like(out)
    out.backward(incoming)
    expected.backward(incoming)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for (name, mine), (other, parameter) in zip(layer.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other
        torch.testing.assert_close(mine.grad, parameter.grad)


@pytest.mark.parametrize("shape", [(1, 1, 1), (12, 3, 5), (200, 2, 70), (9, 1, 0)])
def test_scores_as_good_as_pytorch(shape):
    """The kernel's scores and gradients, by the policy of docs/correctness.md; bit-equal for any number of threads."""
    g = torch.Generator().manual_seed(0)
    _, heads, features = shape
    leaves = [torch.randn(size, generator=g) for size in (shape, (1, heads, features), (1, heads, features))]
    incoming = [torch.randn(size, generator=g) for size in (shape, shape[:2], shape[:2])]

    def results(function, dtype):
        inputs = [t.to(dtype).requires_grad_() for t in leaves]
        outs = function(*inputs)
        grads = torch.autograd.grad(outs, inputs, [t.to(dtype) for t in incoming])
        return [t.detach().double() for t in (*outs, *grads)]

    def plain(value, src, dst):
        return value * 1, *((value * vector).sum(2) for vector in (src, dst))

    got, theirs = (results(function, torch.float32) for function in (value_and_scores, plain))
    exact = results(plain, torch.float64)
    for name, *found in zip(("value", "scores", "scores", *["gradient"] * 3), got, theirs, exact, strict=True):
        assert found[0].shape == found[2].shape
        if found[0].numel():
            assert_error(name, *found, torch.float32)
    assert_bit_equal([got, *over_threads(lambda: results(value_and_scores, torch.float32))])


def test_scores_have_gradients():
    leaves = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((7, 2, 3), (1, 2, 3), (1, 2, 3))]
    assert torch.autograd.gradcheck(value_and_scores, leaves)
    grad = torch.autograd.grad(value_and_scores(*leaves)[1].sum(), leaves, create_graph=True)[0]
    with pytest.raises(RuntimeError, match='use_backend\\("reference"\\)'):
        grad.sum().backward()


def test_the_layer_in_plain_pytorch():
    """The kernel for scores, and the formulas elsewhere: the same layer, also with a second derivative."""
    layer, x, graph = GraphAttention(7, 5, 2).double(), torch.randn(12, 7).double(), Graph.from_edges(EDGES, 12)
    expected = torch.autograd.grad(layer(x, graph).square().sum(), layer.parameters())
    with mlfast.use_backend("reference"):
        got = torch.autograd.grad(layer(x, graph).square().sum(), layer.parameters(), create_graph=True)
        got[0].sum().backward()
    torch.testing.assert_close([g.detach() for g in got], list(expected))


def test_graphs_as_tensors_and_complete():
    layer, x, graph = GraphAttention(7, 5, 2), torch.randn(12, 7), Graph.from_edges(EDGES, 12)
    torch.testing.assert_close(layer(x, graph.to_dense()), layer(x, graph))
    torch.testing.assert_close(layer(x), layer(x, torch.ones(12, 12)))


def test_dropout_in_training_only():
    layer, x = GraphAttention(7, 5, dropout=0.5), torch.randn(12, 7)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_scores_are_float32_under_autocast():
    layer, x = GraphAttention(7, 5), torch.randn(12, 7)
    expected = layer.scores(x, layer.lin(x).unflatten(1, (1, 5)))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        torch.testing.assert_close(layer.scores(x, layer.lin(x).unflatten(1, (1, 5))), expected, rtol=0, atol=0)
        few = layer.scores(x[:5], layer.lin(x[:5]).unflatten(1, (1, 5)))
        assert few[0].dtype == few[1].dtype == torch.float32
    assert copy.deepcopy(layer).bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_initialisation_as_in_the_released_code_of_the_gat_paper():
    torch.manual_seed(0)
    layer = GraphAttention(300, 200, 4, bias=True)
    limit = 1.414 * (6 / (300 + 800)) ** 0.5
    assert 0.98 * limit < layer.lin.weight.abs().max() <= limit
    assert layer.bias.count_nonzero() == 0


def test_module():
    layer = mlfast.GraphAttention(7, 5, 2, dropout=0.1)
    assert "in_features=7, out_features=5, num_heads=2" in repr(layer)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "lin.weight": (10, 7),
        "att_src": (1, 2, 5),
        "att_dst": (1, 2, 5),
    }
    with pytest.raises(ValueError, match=r"GraphAttention expects \[K, 7\], got \[3, 6\]"):
        layer(torch.ones(3, 6))
    for wrong in (dict(num_heads=0), dict(dropout=1.0), dict(negative_slope=-1.0)):
        with pytest.raises(ValueError, match="GraphAttention needs"):
            GraphAttention(**(dict(in_features=7, out_features=5) | wrong))


@pytest.mark.parametrize("graph", [None, torch.eye(9, dtype=torch.bool)], ids=["complete", "mask"])
def test_under_a_checkpoint_that_unpacks_tensors_once(graph):
    layer, x = GraphAttention(8, 4, 2), torch.randn(9, 8, requires_grad=True)
    expected = torch.autograd.grad(layer(x, graph).square().sum(), x)
    out = torch.utils.checkpoint.checkpoint(layer, x, graph, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), x), expected, rtol=0, atol=0)
