import copy

import pytest
import torch
from torch.nn.functional import elu, leaky_relu

import mlfast
from mlfast.nn.graph_branch import GraphBranch, GraphConvolution

KINDS = ["gat", "gcn"]
# Executed with the released code: see the values below.
X = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, -1.0]])
A = torch.tensor([[1.0, 0.0, 0.0], [0.25, 1.0, 0.0], [0.1, 0.2, 1.0]])
W = torch.tensor([[1.0, -0.5], [0.5, 2.0]])
ATTENTION = torch.tensor([0.3, -0.2, 0.1, 0.4])


def make(kind="gat", channels=6, cls=mlfast.GraphBranch, **options):
    torch.manual_seed(0)
    vectors = torch.randn(5, 4)
    matrix = torch.eye(5) + torch.tensor([[0, 0.3, 0, 0, 0.2]] + [[0.0] * 5] * 4)
    return cls(vectors, matrix, channels, kind=kind, **options)


def test_the_released_code_on_a_toy_graph():
    layer = mlfast.GraphAttention(2, 2)
    with torch.no_grad():
        layer.lin.weight.copy_(W.t())
        layer.att_dst.copy_(ATTENTION[:2].view(1, 1, 2))
        layer.att_src.copy_(ATTENTION[2:].view(1, 1, 2))
    out = elu(layer(X, mlfast.Graph.from_dense(A)))
    expected = torch.tensor([[1, -0.3934693], [0.6692485, 1.1537579], [0.5420786, 0.7618276]])
    torch.testing.assert_close(out, expected)
    weight = torch.sigmoid(leaky_relu(out, 0.2).amax(0))
    torch.testing.assert_close(weight, torch.tensor([0.7310586, 0.7601966]))

    branch = mlfast.GraphBranch(X, A, 2).eval()
    branch.layers[0] = layer
    x = leaky_relu(out, 0.2)
    second = elu(branch.layers[1](x, mlfast.Graph.from_dense(A)))
    torch.testing.assert_close(branch.weight(), torch.sigmoid(leaky_relu(second, 0.2).amax(0)))


def test_graph_convolutions_by_the_formula():
    branch = make("gcn")
    z = torch.eye(5)
    z[0, 1], z[0, 4] = 0.3, 0.2
    first, second = branch.layers
    hidden = leaky_relu(z @ (branch.vectors @ first.weight), 0.2)
    expected = leaky_relu(z @ (hidden @ second.weight), 0.2).max(0).values
    torch.testing.assert_close(branch.weight(), torch.sigmoid(expected))
    without = make("gcn", sigmoid=False)
    torch.testing.assert_close(without.weight(), expected)


def test_weights_of_a_graph_convolution_are_drawn_by_the_outputs():
    weight = GraphConvolution(300, 400).weight
    assert weight.shape == (300, 400) and 0.049 < weight.abs().max() <= 0.05
    assert weight.std().item() == pytest.approx(0.05 / 3**0.5, rel=0.01)


def test_attention_uses_the_pattern_only():
    z = torch.eye(5)
    z[0, 1] = z[0, 4] = 7.0
    torch.manual_seed(0)
    vectors = torch.randn(5, 4)
    expected = make().eval().weight()
    for graph in (z, mlfast.Graph.from_dense(z)):
        other = mlfast.GraphBranch(vectors, graph, 6).eval()
        other.load_state_dict(make().state_dict())
        torch.testing.assert_close(other.weight(), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_shape_range_and_gradients(kind):
    branch = make(kind, hidden_features=3)
    weight = branch.weight()
    assert weight.shape == (6,) and bool(((weight > 0) & (weight < 1)).all())
    weight.sum().backward()
    assert all(p.grad is not None for p in branch.parameters())
    assert all(p.grad.abs().sum() > 0 for name, p in branch.named_parameters() if "att" not in name)
    assert not branch.vectors.requires_grad and branch.layers[0](branch.vectors, branch.links()).shape == (5, 3)


def test_dropout_only_in_training():
    branch = make(dropout=0.5)
    torch.manual_seed(1)
    assert not torch.equal(branch.weight(), branch.weight())
    assert torch.equal(branch.eval().weight(), branch.weight())


@pytest.mark.parametrize("kind", KINDS)
def test_graph_and_vectors_are_saved_moved_and_copied(kind):
    branch = make(kind).eval()
    other = make(kind, channels=6).eval()
    torch.manual_seed(5)
    with torch.no_grad():
        other.vectors.normal_()
        for parameter in other.parameters():
            parameter.normal_()
    other.edge_index = other.edge_index.flip(0)
    other.kept_graph = other._graph_of_edges()
    assert not torch.allclose(other.weight(), branch.weight())
    other.load_state_dict(branch.state_dict())
    torch.testing.assert_close(other.weight(), branch.weight())
    torch.testing.assert_close(copy.deepcopy(branch).weight(), branch.weight())
    double = copy.deepcopy(branch).double()
    assert double.weight().dtype == torch.float64
    torch.testing.assert_close(double.weight().float(), branch.weight())
    assert branch.to("meta").links().device.type == "meta"


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_whole(kind):
    branch = make(kind, dropout=0.0)
    compiled = torch.compile(branch.weight, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(), branch.weight())


def test_wrong_arguments_name_the_remedy():
    vectors = torch.randn(5, 4)
    with pytest.raises(ValueError, match="kind must be one of gat, gcn, got 'sage'"):
        make("sage")
    with pytest.raises(ValueError, match=r"graph must be \[5, 5\], for the 5 labels of vectors, got \[4, 4\]"):
        mlfast.GraphBranch(vectors, torch.eye(4), 6)
    with pytest.raises(ValueError, match="over the 5 labels of vectors, got 4 nodes"):
        mlfast.GraphBranch(vectors, mlfast.Graph.from_dense(torch.eye(4)), 6)
    with pytest.raises(ValueError, match="needs the weights of edges"):
        mlfast.GraphBranch(vectors, mlfast.Graph.from_dense(torch.eye(5)), 6, kind="gcn")
    with pytest.raises(ValueError, match=r"vectors must be a floating point tensor \[K, N\], .* got \[5\] of"):
        mlfast.GraphBranch(vectors[:, 0], torch.eye(5), 6)


# ---------------------------------------------------------------------------------------------------------- ML-GCN


def ml_gcn(cosine):
    torch.manual_seed(0)
    return mlfast.MLGCN(6, 5, vectors=torch.randn(5, 4), graph=torch.eye(5) + 0.1, hidden_features=8, cosine=cosine)


@pytest.mark.parametrize("cosine", [True, False])
def test_ml_gcn_by_the_formula(cosine):
    head, features = ml_gcn(cosine), torch.randn(3, 6, 2, 4)
    first, second = head.layers
    z = torch.eye(5) + 0.1
    classifiers = z @ (leaky_relu(z @ (head.vectors @ first.weight), 0.2) @ second.weight)
    pooled = features.flatten(2).max(2).values
    expected = pooled @ classifiers.t()
    if cosine:
        expected = expected / (pooled.norm(dim=1, keepdim=True) * classifiers.norm(dim=1))
    torch.testing.assert_close(head(features), expected)
    folded = head.fold()
    torch.testing.assert_close(folded(features), expected)
    assert list(folded.state_dict()) == ["classifiers"] and not list(folded.parameters())


def test_ml_gcn_names_what_is_wrong():
    with pytest.raises(ValueError, match="a vector for each of the 4 classes, got 5"):
        mlfast.MLGCN(6, 4, vectors=torch.randn(5, 4), graph=torch.eye(5))
    with pytest.raises(ValueError, match=r"expects features \[B, 6, h, w\], got \[2, 5, 3, 3\]"):
        ml_gcn(True)(torch.randn(2, 5, 3, 3))


def test_of_graph_convolutions_the_buffers_are_the_graph():
    branch = make("gcn").eval()
    expected = copy.deepcopy(branch)
    state = {name: 3 * tensor if name == "edge_weight" else tensor for name, tensor in branch.state_dict().items()}
    expected.load_state_dict(state)
    call = torch.func.functional_call(Weight(branch), {f"branch.{name}": tensor for name, tensor in state.items()}, ())
    torch.testing.assert_close(call, expected.weight())
    assert not torch.allclose(branch.weight(), expected.weight())
    branch.edge_weight.mul_(3)
    torch.testing.assert_close(branch.weight(), expected.weight())


class Weight(torch.nn.Module):
    """A branch as a module that is called."""

    def __init__(self, branch):
        super().__init__()
        self.branch = branch

    def forward(self):
        return self.branch.weight()


@pytest.mark.parametrize("head", [mlfast.MLGCN, GraphBranch])
def test_numbers_that_are_none_are_refused(head):
    good, bad = torch.rand(5, 4), torch.full((5, 5), torch.nan)
    with pytest.raises(ValueError, match="graph must be numbers, got NaN"):
        head(vectors=good, graph=bad, **SIZES[head])
    with pytest.raises(ValueError, match="vectors must be finite numbers"):
        head(vectors=good / 0, graph=torch.ones(5, 5), **SIZES[head])


SIZES = {mlfast.MLGCN: {"in_features": 6, "num_classes": 5}, GraphBranch: {"out_features": 6}}


def test_a_bare_head_is_exported():
    head = mlfast.MLGCN(6, 5, vectors=torch.rand(5, 4), graph=torch.eye(5)).eval()
    x = torch.rand(2, 6, 3, 3)
    torch.testing.assert_close(torch.export.export(head, (x,)).module()(x), head(x))
