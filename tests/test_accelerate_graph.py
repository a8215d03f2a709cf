"""mlfast.accelerate on graph layers: torch_geometric's GATConv."""

import pytest
import torch
from torch import nn

import mlfast
from mlfast.nn.edge_index_attention import EdgeIndexAttention
from tests import published
from tests.test_accelerate import assert_same, reason, swap

pytestmark = pytest.mark.usefixtures("one_thread")


EDGES = torch.tensor([[0, 1, 2, 3, 0, 2, 4], [1, 2, 3, 0, 0, 1, 1]])


def torch_geometric_layer(*sizes, **options):
    reason = "torch_geometric is not among the packages for development; the stand-in is swapped instead"
    return pytest.importorskip("torch_geometric.nn", reason=reason).GATConv(*sizes, **options)


@pytest.mark.parametrize("make", [published.GATConv, torch_geometric_layer], ids=["stand-in", "torch_geometric"])
@pytest.mark.parametrize(
    "options",
    [{}, {"heads": 3}, {"add_self_loops": False}, {"bias": False, "heads": 2}, {"concat": False}, {"dropout": 0.5}],
    ids=str,
)
def test_gat_conv(make, options):
    torch.manual_seed(0)
    layer = make(7, 4, **options).eval()
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    theirs, ours = swap(layer)
    assert isinstance(ours, EdgeIndexAttention) and ours.lin.weight is layer.lin.weight and not ours.training
    assert ours._built is None  # the graph of the trial is not kept
    x = torch.randn(6, 7)
    assert_same(theirs, ours, x, EDGES)
    assert {name: t.shape for name, t in ours.state_dict().items()} == {
        name: t.shape for name, t in theirs.state_dict().items()
    }
    if options.get("dropout"):
        assert not torch.equal(ours.train()(x, EDGES), ours.eval()(x, EDGES))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"heads": 2, "concat": False}, "mean of heads"),
        ({"edge_dim": 3}, "edge_dim"),
        ({"residual": True}, "res is"),
        ({"flow": "target_to_source"}, "flow"),
        ({"aggr": "max"}, "aggr"),
    ],
    ids=str,
)
def test_gat_conv_with_other_options_is_left(options, words):
    assert words in reason(torch_geometric_layer(7, 4, **options))
    if "residual" not in options:
        assert words in reason(published.GATConv(7, 4, **options))


def test_gat_conv_of_two_sets_or_unknown_size_is_left():
    layer = published.GATConv(7, 4)
    layer.in_channels = (7, 7)
    assert "two sets" in reason(layer)
    layer.in_channels = -1
    assert "not known before its first call" in reason(layer)


def test_the_graph_is_kept_while_the_edges_are_the_same():
    layer, _ = mlfast.accelerate(published.GATConv(7, 4))
    edges, x = EDGES.clone(), torch.randn(6, 7)
    graph = layer.graph_of(edges, 6)
    layer(x, edges)
    assert layer.graph_of(edges, 6) is graph
    assert layer.graph_of(edges, 7) is not graph  # more nodes
    graph = layer.graph_of(edges, 6)
    assert layer.graph_of(edges.clone(), 6) is not graph
    graph = layer.graph_of(edges, 6)
    edges[0, 0] = 5  # in place
    changed = layer.graph_of(edges, 6)
    assert changed is not graph and changed.to_dense()[1, 5] and not changed.to_dense()[1, 0]
    with torch.inference_mode():
        uncounted = EDGES.clone()
    graph = layer.graph_of(uncounted, 6)
    assert layer.graph_of(uncounted, 6) is not graph


def test_the_call_of_gat_conv():
    layer, _ = mlfast.accelerate(published.GATConv(7, 4))
    x = torch.randn(6, 7)
    torch.testing.assert_close(layer(x, EDGES, torch.ones(7), size=(6, 6)), layer(x, EDGES))
    with pytest.raises(ValueError, match="2 edges twice"):
        layer(x, torch.cat([EDGES, EDGES[:, :2]], dim=1))
    with pytest.raises(ValueError, match="weights are never stored"):
        layer(x, EDGES, return_attention_weights=True)
    with pytest.raises(ValueError, match=r"size must be None or \(6, 6\)"):
        layer(x, EDGES, size=(6, 5))
    with pytest.raises(TypeError, match="x must be a dense tensor, got tuple"):
        layer((x, x), EDGES)
    with pytest.raises(TypeError, match="edge_index must be a dense tensor"):
        layer(x, torch.eye(6).to_sparse())


def test_new_weights_are_drawn_as_theirs():
    layer, _ = mlfast.accelerate(published.GATConv(300, 256))
    torch.manual_seed(0)
    layer.reset_parameters()
    bound = (6 / (300 + 256)) ** 0.5  # Glorot's, without a gain
    assert 0.99 * bound < layer.lin.weight.abs().max() <= bound
