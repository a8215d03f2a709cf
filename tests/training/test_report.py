"""report.html: complete, self-contained, and about the right images."""

import re

import numpy as np
import pytest
import torch

from mlfast.evaluation import Predictions
from mlfast.training import fit
from mlfast.training.report import Mistakes, _label_graph, _threshold_curves, render


def test_a_run_ends_with_a_report_of_its_best_model(tiny):
    result = fit(tiny(epochs=1, report=True), quiet=True)
    page = (result.run_dir / "report.html").read_text()
    assert f">{100 * result.best['mAP']:.1f}</td>" in page
    assert not re.findall(r"https?:|<script|<link|src=\"(?!data:)", page)
    assert 0 < page.count("<figure>") <= 24
    assert page.count('src="data:image/png') == 3 + ("An arrow from one label" in page)
    for title in ("epochs", "each class", "threshold", "false positives", "misses", "together", "Label graph"):
        assert re.search(f"<h2>[^<]*{title}[^<]*</h2>", page), title


def test_report_false_leaves_it_out(tiny):
    assert not (fit(tiny(epochs=1), quiet=True).run_dir / "report.html").exists()


def test_the_worst_mistakes_are_found_across_batches_and_unknown_labels_are_none():
    torch.manual_seed(0)
    scores = torch.rand(60, 5)
    targets = torch.randint(-1, 2, (60, 5)).to(torch.int8)
    images = torch.arange(60, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    mistakes = Mistakes()
    for rows in torch.arange(60).split(7):
        mistakes.add(images[rows], scores[rows], targets[rows], [f"image {row}" for row in rows.tolist()])
    worst = scores.where((targets == 0) & (scores >= 0.5), -1).max(dim=1)
    expected = worst.values.sort(descending=True)
    found = mistakes.false_positives
    assert [mistake.probability for mistake in found] == pytest.approx(expected.values[:12].tolist())
    assert [mistake.name for mistake in found] == [f"image {row}" for row in expected.indices[:12].tolist()]
    assert all(int(mistake.image[0, 0, 0]) == int(mistake.name.split()[1]) for mistake in found)
    least = scores.where((targets > 0) & (scores < 0.5), 2).min(dim=1).values.sort().values[:12]
    assert [mistake.probability for mistake in mistakes.misses] == pytest.approx(least.tolist())
    assert all(mistake.targets[mistake.label] == 1 for mistake in mistakes.misses)


def test_what_the_threshold_decides_rightly_is_no_mistake():
    scores = torch.tensor([[0.77, 0.5], [0.49, 0.2], [0.5, 0.3]])
    targets = torch.tensor([[1, 0], [1, 0], [1, 0]])
    mistakes = Mistakes()
    mistakes.add(torch.zeros(3, 3, 4, 4, dtype=torch.uint8), scores, targets, ["a", "b", "c"])
    assert [(mistake.name, mistake.label) for mistake in mistakes.misses] == [("b", 0)]
    assert [(mistake.name, mistake.label) for mistake in mistakes.false_positives] == [("a", 1)]


def test_precision_and_recall_by_threshold():
    scores = np.array([[0.9, 0.2], [0.6, 0.7], [0.3, 1.0]], dtype=np.float32)
    targets = np.array([[1, 0], [0, 1], [1, -1]], dtype=np.int8)
    lines = {line.get_label(): line.get_ydata() for line in _threshold_curves(scores, targets).axes[0].lines}
    assert lines["precision"][50] == pytest.approx(100 * 2 / 3) and lines["recall"][50] == pytest.approx(100 * 2 / 3)
    assert lines["precision"][0] == pytest.approx(60) and lines["recall"][0] == 100
    assert lines["recall"][95] == 0 and np.isnan(lines["precision"][95])


def test_the_label_graph_is_that_of_the_labels():
    targets = np.array([[1, 1, 0], [1, 1, 0], [0, 1, 1], [0, 1, 0], [0, 1, -1]], dtype=np.int8)
    assert "data:image/png" in _label_graph(targets, ["a", "b", "c"])
    assert "No label is on 40 %" in _label_graph(np.eye(3, dtype=np.int8), ["a", "b", "c"])


def test_nothing_to_show_and_names_that_are_html():
    predictions = Predictions(2)
    predictions.add(torch.full((3, 2), 0.5), torch.tensor([[0, 0], [0, 1], [-1, 0]]))
    page = render("<run>", [{"epoch": 1, "loss": None, "mAP": None}], ["<a>", "b & c"], predictions, Mistakes())
    assert "&lt;run&gt;" in page and "&lt;a&gt;" in page and "b &amp; c" in page and "<p>None.</p>" in page
    assert "<td class=number>-</td>" in page  # the AP of a class without a positive
