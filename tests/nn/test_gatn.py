"""GATN against its formulas, and its transformer layer against PyTorch's."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mlfast
from mlfast.nn.gatn import AdjacencyTransformer, label_similarity


def make(num_classes=5, cosine=True, **options):
    torch.manual_seed(0)
    vectors = torch.randn(num_classes, 4)
    return mlfast.GATN(6, num_classes, vectors=vectors, hidden_features=8, cosine=cosine, **options)


def disturb(module):
    """Away from the initial weights, some of which are zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module.eval()


def test_labels_are_linked_by_the_cosine_of_their_vectors():
    vectors = torch.tensor([[1.0, 0], [3, 0], [1, 1], [-1, 0.1], [0, 0]])
    half = 0.5**0.5
    expected = torch.zeros(5, 5)
    expected[0, 1] = expected[1, 0] = 1
    expected[0, 2] = expected[2, 0] = expected[1, 2] = expected[2, 1] = half
    torch.testing.assert_close(label_similarity(vectors, 0.2), expected)
    assert (label_similarity(vectors, 0.8) > 0).sum() == 2


def test_training_begins_at_the_similarity_graph():
    head = make().eval()
    linked = head.similarity + torch.eye(5)
    torch.testing.assert_close(head.adjacency(), linked / linked.sum(1, keepdim=True))
    assert (head.similarity > 0).any()


@pytest.mark.parametrize("cosine", [True, False])
def test_by_the_formula(cosine):
    head, features = disturb(make(cosine=cosine)), torch.randn(3, 6, 2, 4)
    linked = head.transformer(head.similarity).clamp(min=0) + torch.eye(5)
    z = linked / linked.sum(1, keepdim=True)
    first, second = (layer.weight for layer in head.layers)
    classifiers = z @ F.leaky_relu(z @ head.vectors @ first, 0.2) @ second
    pooled = features.flatten(2).max(2).values
    expected = pooled @ classifiers.t()
    if cosine:
        expected = expected / (pooled.norm(dim=1, keepdim=True) * classifiers.norm(dim=1))
    torch.testing.assert_close(head(features), expected)
    folded = head.fold()
    torch.testing.assert_close(folded(features), expected)
    assert list(folded.state_dict()) == ["classifiers"] and not list(folded.parameters())


def test_the_transformer_layer_is_pytorchs():
    """Where the heads divide K; a layer of PyTorch then has the same sizes."""
    ours = disturb(AdjacencyTransformer(8, 4, 0.1))
    theirs = nn.TransformerEncoderLayer(8, 4, 32, activation="relu", batch_first=True, norm_first=True).eval()
    names = {
        "self_attn.in_proj_": "input_projection.",
        "self_attn.out_proj.": "out_projection.",
        **{f"{name}.": f"{name}." for name in ("norm1", "norm2", "linear1", "linear2")},
    }
    state = ours.state_dict()
    pairs = {f"{a}{leaf}": state[f"{b}{leaf}"] for a, b in names.items() for leaf in ("weight", "bias")}
    theirs.load_state_dict(pairs)
    x = torch.rand(8, 8)
    torch.testing.assert_close(ours(x), theirs(x[None])[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_classes", [1, 7])
def test_heads_need_not_divide_the_number_of_labels(num_classes):
    head = disturb(make(num_classes)).train()
    assert head(torch.randn(2, 6, 3, 3)).shape == (2, num_classes)
    head.adjacency().square().sum().backward()
    torch.testing.assert_close(head.adjacency().sum(1), torch.ones(num_classes))
    assert all(p.grad is not None for p in head.transformer.parameters())


def test_folding_in_training_drops_nothing():
    head = disturb(make()).train()
    torch.testing.assert_close(head.fold().classifiers, head.eval().represent())
    assert head.train().fold() is not None and head.training


def test_a_step_reaches_the_graph():
    head = make().train()
    head(torch.randn(2, 6, 3, 3)).square().sum().backward()
    assert head.transformer.out_projection.weight.grad.abs().sum() > 0
    assert not head.vectors.requires_grad and {"vectors", "similarity"} <= set(head.state_dict())


def test_compiles_whole():
    head, features = disturb(make()), torch.randn(2, 6, 3, 3)
    with torch.no_grad():
        compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(features), head(features))


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="a vector for each of the 4 classes, got 5"):
        mlfast.GATN(6, 4, vectors=torch.randn(5, 4))
    with pytest.raises(ValueError, match=r"vectors must be a floating point tensor \[K, N\], .* got \[5\] of"):
        mlfast.GATN(6, 5, vectors=torch.randn(5))
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\], got 2"):
        make(threshold=2)
    with pytest.raises(ValueError, match=r"GATN needs sizes of at least 1.*num_heads=0"):
        make(num_heads=0)
    with pytest.raises(TypeError, match=r"GATN: num_heads must be an integer, got float 2\.5"):
        make(num_heads=2.5)
    with pytest.raises(ValueError, match=r"GATN: dropout must be in \[0, 1\), got nan"):
        make(dropout=float("nan"))
    with pytest.raises(ValueError, match=r"expects features \[B, 6, h, w\], got \[2, 5, 3, 3\]"):
        make()(torch.randn(2, 5, 3, 3))
