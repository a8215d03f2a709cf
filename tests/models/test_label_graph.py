"""The label graph: counting, Z against the released code's values, and models that use it."""

import sys

import numpy as np
import pytest
import torch

import mlfast
from mlfast import cli
from mlfast.models import conditional_probabilities, count_labels, create_label_graph
from mlfast.models.label_graph import normalise
from mlfast.training.graph_drawing import circle_order

pytestmark = pytest.mark.usefixtures("one_thread")

TARGETS = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 0, 1], [1, 0, 0], [1, 0, 0]])


# ---------------------------------------------------------------------------------------------------------- counting


def test_counts_of_images():
    counts = count_labels(TARGETS)
    assert counts.together.tolist() == [[5, 2, 1], [2, 2, 0], [1, 0, 1]]
    assert counts.known.tolist() == [[5] * 3, [2] * 3, [1] * 3]
    expected = torch.tensor([[0, 0.4, 0.2], [1, 0, 0], [1, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(conditional_probabilities(counts), expected)
    torch.testing.assert_close(conditional_probabilities(counts.together), expected)
    torch.testing.assert_close(conditional_probabilities(count_labels(TARGETS.bool())), expected)


def test_unknown_labels_are_left_out():
    targets = torch.tensor([[1, 1, -1], [1, -1, 0], [1, 0, 1], [-1, 1, 1]])
    probabilities = conditional_probabilities(count_labels(targets))
    # Label 0 on three images: label 1 is known on two of them and there on one.
    assert probabilities.tolist() == [[0, 0.5, 0.5], [1, 0, 1], [1, 0.5, 0]]
    for dtype in (torch.int8, torch.float32):
        assert torch.equal(conditional_probabilities(count_labels(targets.to(dtype))), probabilities)
    assert torch.equal(conditional_probabilities(count_labels(targets.to(torch.uint8))), probabilities)


@pytest.mark.parametrize("chunk", [1, 7, 1 << 24])
def test_sparse_targets_and_chunks_count_the_same(monkeypatch, chunk):
    torch.manual_seed(0)
    targets = (torch.rand(97, 11) < 0.3).to(torch.uint8)
    expected = targets.long().t() @ targets.long()
    monkeypatch.setattr("mlfast.models.label_graph._CHUNK", chunk)
    for form in (targets, mlfast.SparseTargets.from_dense(targets), mlfast.SparseTargets.from_dense(targets)[:97]):
        counts = count_labels(form)
        assert torch.equal(counts.together, expected)
        assert torch.equal(counts.known, expected.diagonal()[:, None].expand(11, 11))
    assert torch.equal(count_labels(mlfast.SparseTargets.from_lists([], 3)).together, torch.zeros(3, 3).long())


# --------------------------------------------------------------------------------------------------------- the graph


def test_normalisation_of_the_released_code():
    a = torch.tensor([[1, 0, 0], [0.25, 1, 0], [0.1, 0.2, 1]])
    expected = torch.tensor([[1, 0.2236068, 0.0877058], [0, 0.8, 0.1568929], [0, 0, 0.7692308]])
    torch.testing.assert_close(normalise(a), expected)


def test_the_effect_aggregates_from_the_cause():
    with pytest.warns(UserWarning, match=r"1 of 4 labels have no neighbour in the label graph: dog; a lower thr"):
        graph = create_label_graph(
            torch.tensor([[9, 0, 3, 0], [0, 4, 2, 0], [3, 2, 4, 0], [0, 0, 0, 7]]), ["a", "b", "c", "dog"]
        )
    assert graph.edges == [(1, 2), (2, 0), (2, 1)]  # P = 2/4, 3/4 and 2/4; 3/9 is below 0.4
    assert graph.isolated == [3]
    # Label 2 is in A's row 1 (its cause): A[1, 2] = p, since one edge leads to 2.
    a = torch.eye(4)
    a[1, 2] = a[2, 0] = a[2, 1] = 0.25
    d = a.sum(1).rsqrt().diag()
    torch.testing.assert_close(graph.matrix, (a @ d).t() @ d, rtol=1e-5, atol=1e-6)
    assert graph.matrix[2, 1] > 0 and graph.matrix[0, 2] > 0 and graph.matrix[2, 0] == 0


def test_edges_into_a_label_share_their_weight():
    together = torch.tensor([[4, 0, 2], [0, 4, 3], [2, 3, 20]])
    graph = create_label_graph(together, neighbour_share=0.5)
    assert graph.edges == [(0, 2), (1, 2)]
    d = 1.25**-0.5
    assert graph.matrix[2].tolist() == pytest.approx([0.25 * d, 0.25 * d, 1], rel=1e-5)
    assert len(create_label_graph(together, threshold=0.1).edges) == 4


def test_counts_that_are_none():
    for wrong, message in (
        (TARGETS, r"must be \[K, K\], got \[5, 3\]; for targets \[N, K\] pass count_labels"),
        (TARGETS[:3], "must be numbers of images: symmetric"),
        (torch.ones(3, 3) + torch.ones(3, 3).fill_diagonal_(0), "nowhere more in row i"),
    ):
        with pytest.raises(ValueError, match=message):
            create_label_graph(wrong)
    with pytest.raises(TypeError, match="must be LabelCounts or a tensor"):
        create_label_graph(np.eye(3))
    with pytest.raises(TypeError, match="targets must be a tensor"):
        count_labels([[1, 0]])
    with pytest.raises(ValueError, match=r"targets must be \[N, K\], a row per image, got \[3\]"):
        count_labels(TARGETS[0])
    with pytest.raises(ValueError, match="threshold must be above 0 and at most 1, got 0"):
        create_label_graph(torch.eye(3), threshold=0)


# -------------------------------------------------------------------------------------------------------- the models


def linked_targets(num_images=32):
    """Random targets of 5 labels, where 0 brings 1, and 2 brings 3."""
    torch.manual_seed(1)
    targets = (torch.rand(num_images, 5) < 0.3).to(torch.uint8)
    targets[:, 1] |= targets[:, 0]
    targets[:, 3] |= targets[:, 2]
    return targets


def make(head="gap", graph=None, cosine=True, **options):
    torch.manual_seed(0)
    small = {"hidden_features": 64}
    arguments = {"ml_decoder": {"embed_dim": 64, "feedforward_dim": 64}, "ml_gcn": small, "gatn": small}.get(head)
    options = {"cooccurrence": count_labels(linked_targets())} | options
    return mlfast.create_model(
        "test_efficientnet", 5, head=head, head_args=arguments, graph=graph, cosine=cosine, **options
    )


@pytest.mark.filterwarnings("ignore:.*no neighbour")
@pytest.mark.parametrize(
    ("head", "graph"),
    [
        ("gap", "gat_reweight"),
        ("ml_decoder", "gat_reweight"),
        ("q2l", "gcn_reweight"),
        ("csra", "gcn_reweight"),
        ("ml_gcn", "gat_reweight"),
        ("gatn", "gat_reweight"),
    ],
)
def test_folded_branches_are_constants_and_export_without_graph(head, graph):
    model, images = make(head, graph), torch.randn(4, 3, 32, 32)
    model(images)
    folded = model.fold()
    expected = model.eval()(images)
    torch.testing.assert_close(folded(images), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(folded.graph_branch.weight(), model.graph_branch.weight(), rtol=1e-5, atol=1e-5)
    program = torch.export.export(folded, (images,))
    torch.testing.assert_close(program.module()(images), expected, rtol=1e-5, atol=1e-5)
    kept = {*program.state_dict, *(str(node.target) for node in program.graph.nodes)}
    assert not [name for name in kept if any(word in name for word in ("vectors", "edge", "layers", "graph_attention"))]
    assert "aten.elu.default" not in kept
    assert "graph_branch.value" in program.state_dict


@pytest.mark.filterwarnings("ignore:.*no neighbour")
@pytest.mark.parametrize(
    ("head", "graph"), [("gap", "gat_reweight"), ("gap", "gcn_reweight"), ("ml_gcn", None), ("gatn", None)]
)
def test_bfloat16_autocast_trains(head, graph):
    model, images = make(head, graph), torch.randn(4, 3, 48, 48)
    model(images)
    expected = model.eval()(images)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(images).float(), expected, rtol=0, atol=0.1)
        mlfast.AAMLoss()(model.train()(images), torch.ones(4, 5)).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.filterwarnings("ignore:.*no neighbour")
def test_what_does_not_fit_is_named():
    with pytest.raises(
        ValueError, match=r"co-occurrence, which is missing: pass cooccurrence=mlfast.models.count_labels"
    ):
        make("ml_gcn", cooccurrence=None)
    with pytest.raises(ValueError, match="cooccurrence is of 3 labels, but num_classes is 5"):
        make(graph="gat_reweight", cooccurrence=count_labels(TARGETS))
    with pytest.raises(ValueError, match=r"label vectors must be \[5, N\], one for each label, .* got \[4, 7\]"):
        make(graph="gat_reweight", label_vectors=np.zeros((4, 7)))
    with pytest.raises(ValueError, match="a LabelGraph has no counts to make them of"):
        make(graph="gat_reweight", cooccurrence=create_label_graph(count_labels(linked_targets())))
    known = "'gat_reweight', 'gcn_reweight', 'ml_gcn', 'gatn', or a module"
    with pytest.raises(ValueError, match=f"unknown graph 'sage'; available: {known}"):
        make(graph="sage")
    with pytest.raises(ValueError, match="graph 'gatn' makes the classifiers, and leaves nothing to the head 'csra'"):
        make("csra", graph="gatn")
    with pytest.raises(
        ValueError, match=r"label vectors are missing: pass label_vectors=, an array .* or cooccurrence=ml"
    ):
        make("gatn", cooccurrence=None)
    with pytest.raises(ValueError, match="graph_args: got kind='gcn', which the graph 'gat_reweight' itself says"):
        make(graph="gat_reweight", graph_args={"kind": "gcn"})
    with pytest.raises(ValueError, match=r"graph 'gat_reweight' does not take these arguments \['nonsense'\]"):
        make(graph="gat_reweight", graph_args={"nonsense": 1})
    with pytest.raises(ValueError, match=r"graph_args are for a graph that is named, got \['sigmoid'\] and graph=None"):
        make(graph_args={"sigmoid": False})


@pytest.mark.filterwarnings("ignore:.*no neighbour")
@pytest.mark.parametrize(("name", "kind"), [("ml_gcn", mlfast.MLGCN), ("gatn", mlfast.GATN)])
def test_graphs_that_make_the_classifiers_are_heads_by_either_name(name, kind):
    for model in (
        make(name),
        make(name, graph=name),
        mlfast.create_model("test_efficientnet", 5, graph=name, cooccurrence=count_labels(linked_targets())),
    ):
        assert isinstance(model.classifier, kind) and model.graph_branch is None and not model.pooled


def test_gatn_needs_no_cooccurrence_beside_vectors():
    model = make("gatn", cooccurrence=None, label_vectors=torch.randn(5, 7)).eval()
    assert model.classifier.vectors.shape == (5, 7)
    images = torch.randn(3, 3, 48, 64)
    torch.testing.assert_close(model.fold()(images), model(images), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*no neighbour")
def test_the_released_branch_is_graph_convolution_and_mean_pooling():
    vectors, graph = torch.randn(5, 7), create_label_graph(count_labels(linked_targets()))
    branch = mlfast.GraphBranch.released(vectors, graph.matrix, 256)
    assert (branch.kind, branch.sigmoid, branch.pooling) == ("gcn", True, "mean")
    by_name = make(graph="gcn_reweight", graph_args={"pooling": "mean"}, label_vectors=vectors, cooccurrence=graph)
    by_name.graph_branch.load_state_dict(branch.state_dict())
    images = torch.randn(2, 3, 64, 64)
    model = by_name.eval()
    pooled = model.backbone.forward_features(images).mean((2, 3)) * branch.weight()
    torch.testing.assert_close(model(images), model.classifier(pooled))
    torch.testing.assert_close(model.fold()(images), model(images), rtol=1e-5, atol=1e-5)
    assert mlfast.GraphBranch.released(vectors, graph.matrix, 256, kind="gat").pooling == "mean"
    with pytest.raises(ValueError, match=r"pooling must be one of mean\+max, mean, got 'max'"):
        mlfast.GraphBranch(vectors, graph.matrix, 256, pooling="max")


# ------------------------------------------------------------------------------------------------------- the command


def test_the_command_prints_and_draws_a_file(tmp_path, capsys):
    np.save(tmp_path / "targets.npy", TARGETS.numpy())
    out = tmp_path / "graph.png"
    assert cli.main(["graph", "--targets", str(tmp_path / "targets.npy"), "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["1 -> 0  1.00", "2 -> 0  1.00", "0 -> 1  0.40"]
    assert lines[3] == "3 edges with P(second | first) >= 0.4 between 3 labels"
    assert lines[4] == "without neighbours: 0" and out.read_bytes()[:4] == b"\x89PNG"


def test_the_command_finds_the_planted_graph_of_the_digits(tmp_path, capsys, monkeypatch):
    from mlfast.data import DigitScenes, planted_graph

    real = DigitScenes.__init__
    monkeypatch.setattr(
        DigitScenes, "__init__", lambda self, split, **_: real(self, split, 1500, 32, cache_dir=tmp_path)
    )
    assert cli.main(["graph", "--out", str(tmp_path / "g.png"), "--threshold", "0.35"]) == 0
    out = capsys.readouterr().out
    names = DigitScenes("train").classes
    planted = [f"{names[i]} -> {names[j]}" for i, j in zip(*np.nonzero(planted_graph()), strict=True)]
    printed = [" ".join(line.split()[:5]) for line in out.splitlines()]
    assert sum(edge in printed for edge in planted) >= 38


def test_neighbours_stand_side_by_side():
    assert circle_order([(0, 1), (5, 1), (7, 8)]) == [0, 1, 5, 7, 8]


def test_the_command_names_what_is_missing(tmp_path, monkeypatch, capsys):
    np.save(tmp_path / "t.npy", TARGETS.numpy())
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # to the import system: not installed
    assert cli.main(["graph", "--targets", str(tmp_path / "t.npy"), "--out", str(tmp_path / "g.png")]) == 2
    assert 'pip install ".[report]" in a checkout of mlfast' in capsys.readouterr().err


def test_targets_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="targets must be numbers, got NaN; write -1 for unknown"):
        count_labels(torch.tensor([[torch.nan, 1.0], [1.0, 1.0]]))
