"""``report.html``: what a run learned and where it errs, on one page that needs nothing else."""

from __future__ import annotations

import base64
import copy
import html
import io
import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mlfast.evaluation import MultilabelMetrics, Predictions
from mlfast.evaluation.metrics import SCORES
from mlfast.files import write_text
from mlfast.models import conditional_probabilities, count_labels, create_label_graph
from mlfast.models.checkpoint import load_model
from mlfast.training.drawing import BLUE, GREEN, GREY, ORANGE, new_figure, png, tidy
from mlfast.training.graph_drawing import draw_label_graph
from mlfast.training.history import Record, curves

if TYPE_CHECKING:
    from mlfast.training.trainer import Trainer

_THRESHOLD = 0.5
_PICTURES = 12  # of each kind of error
_PICTURE_SIZE = 160  # pixels
_MATRIX_CLASSES, _GRAPH_CLASSES = 30, 60  # the most frequent ones

_PAGE = """\
<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
h1 {{ font-size: 1.5rem }} h2 {{ font-size: 1.15rem; margin-top: 2.2rem }} img {{ max-width: 100% }}
td, th {{ padding: 0 .8rem 0 0; text-align: left; font-weight: normal }} th {{ color: #777 }}
.number {{ text-align: right; font-variant-numeric: tabular-nums }} .scroll {{ max-height: 32rem; overflow: auto }}
.bar {{ background: #3b6fb6; height: .7rem; border-radius: 2px }}
.errors {{ display: flex; flex-wrap: wrap; gap: .8rem }}
figure {{ margin: 0; width: 10rem }} figcaption {{ font-size: .8rem; line-height: 1.3; overflow-wrap: anywhere }}
</style></head><body><h1>{title}</h1>
{body}
</body></html>
"""


class Mistake(NamedTuple):
    """An image and the label on which the model errs most, by its probability."""

    probability: float
    label: int
    targets: Tensor
    image: Tensor
    name: str


@dataclass
class Mistakes:
    """The worst errors of a split at a threshold of 0.5, one label an image.

    Attributes:
        false_positives: labels that an image has not and that reach the threshold, the most probable first.
        misses: labels that an image has and that do not reach it, the least probable first.
    """

    false_positives: list[Mistake] = field(default_factory=list)
    misses: list[Mistake] = field(default_factory=list)

    def add(self, images: Tensor, probabilities: Tensor, targets: Tensor, names: Sequence[str]) -> None:
        """Take in a batch, and keep its images only where they are among the worst so far."""
        predicted = probabilities >= _THRESHOLD
        highest = probabilities.where((targets == 0) & predicted, -1.0).max(dim=1)
        lowest = probabilities.where((targets > 0) & ~predicted, 2.0).min(dim=1)
        for kept, (values, labels), sign in ((self.false_positives, highest, 1), (self.misses, lowest, -1)):
            for row in (sign * values).topk(min(_PICTURES, len(values))).indices.tolist():
                value = float(values[row])
                if 0 <= value <= 1:
                    image = images[row].cpu()
                    kept.append(Mistake(value, int(labels[row]), targets[row].cpu(), image, names[row]))
        self._keep_the_worst()

    @classmethod
    def of_all(cls, shares: Sequence[Mistakes]) -> Mistakes:
        """The worst of a split, of which each process had a share."""
        whole = cls()
        for share in shares:
            whole.false_positives += share.false_positives
            whole.misses += share.misses
        whole._keep_the_worst()
        return whole

    def _keep_the_worst(self) -> None:
        self.false_positives.sort(key=lambda mistake: -mistake.probability)
        self.misses.sort(key=lambda mistake: mistake.probability)
        del self.false_positives[_PICTURES:], self.misses[_PICTURES:]


@torch.no_grad()
def write_report(trainer: Trainer) -> None:
    """Write ``report.html`` into the folder of a finished run, about the model in its ``best``.

    It takes one more pass over the validation images; ``report: false`` leaves it out. Where several processes train,
    all of them have to call it, and each looks at its share.
    """
    if not (trainer.config.report and trainer.history.records):
        return
    model, classes = copy.deepcopy(trainer.model).eval(), trainer.description["classes"]
    if trainer.processes.is_first:
        best = trainer.run_dir / "best"  # missing where no class has a positive
        model.load_state_dict(load_model(best if best.exists() else trainer.run_dir / "last")[0].state_dict())
    trainer.processes.share(itertools.chain(model.parameters(), model.buffers()))
    predictions, mistakes = Predictions(len(classes)), Mistakes()
    for batch in trainer.val.epoch(0):
        probabilities = model.probabilities(trainer.apply(model, batch.images))
        predictions.add(probabilities, batch.targets)
        names = [trainer.val.name(int(row)) for row in batch.rows]
        mistakes.add(batch.images, probabilities, batch.targets, names)
    predictions, mistakes = predictions.gather(), Mistakes.of_all(trainer.processes.gather(mistakes))
    if trainer.processes.is_first:
        page = render(trainer.run_dir.name, trainer.history.records, classes, predictions, mistakes)
        write_text(trainer.run_dir / "report.html", page)


def render(
    title: str, records: list[Record], classes: Sequence[str], predictions: Predictions, mistakes: Mistakes
) -> str:
    """The page as HTML: everything it shows is inside it."""
    scores, targets = (tensor.numpy() for tensor in predictions.matrices())
    metrics = predictions.metrics()
    sections = [
        _summary(metrics, predictions.num_images),
        f"<h2>Over the epochs</h2>{_inline(png(curves(records), dpi=100))}",
        f"<h2>Average precision of each class</h2>{_class_table(metrics, classes, targets)}",
        f"<h2>Precision and recall by threshold</h2>{_inline(png(_threshold_curves(scores, targets), dpi=100))}",
        f"<h2>Worst false positives at threshold 0.5</h2>{_gallery(mistakes.false_positives, classes)}",
        f"<h2>Worst misses at threshold 0.5</h2>{_gallery(mistakes.misses, classes)}",
        f"<h2>Label graph</h2>{_label_graph(targets, classes)}",
        "<h2>Labels that come together</h2><p>Of the images with the label of a row, the share that has the label of a "
        f"column.</p>{_inline(png(_cooccurrence(scores, targets, classes), dpi=100))}",
    ]
    return _PAGE.format(title=html.escape(title), body="\n".join(sections))


def _summary(metrics: MultilabelMetrics, images: int) -> str:
    head = "".join(f"<th class=number>{name}</th>" for name in SCORES)
    cells = "".join(f"<td class=number>{100 * getattr(metrics, name):.1f}</td>" for name in SCORES)
    return (
        f"<p>The best model on {images} validation images, in percent, at threshold 0.5.</p>"
        f"<table><tr>{head}</tr><tr>{cells}</tr></table>"
    )


def _class_table(metrics: MultilabelMetrics, classes: Sequence[str], targets: np.ndarray) -> str:
    support = (targets > 0).sum(axis=0)
    order = np.argsort(-metrics.per_class_ap, kind="stable")  # classes without a positive, nan, come last
    rows = []
    for label in order:
        precision = metrics.per_class_ap[label]
        text, width = ("-", 0.0) if np.isnan(precision) else (f"{100 * precision:.1f}", 100 * precision)
        rows.append(
            f"<tr><td>{html.escape(str(classes[label]))}</td><td class=number>{support[label]}</td>"
            f"<td class=number>{text}</td><td width=100%><div class=bar style='width:{width:.1f}%'></div></td></tr>"
        )
    head = "<tr><th>class</th><th class=number>images</th><th class=number>AP</th><th></th></tr>"
    return f"<div class=scroll><table width=100%>{head}{''.join(rows)}</table></div>"


def _threshold_curves(scores: np.ndarray, targets: np.ndarray) -> Any:
    """Of all pairs of image and label together, at the thresholds 0, 0.01, ..., 1."""
    edges = np.append(np.linspace(0, 1, 101), 2)
    above = [  # pairs with at least this score
        np.histogram(scores[chosen], edges)[0][::-1].cumsum()[::-1] for chosen in (targets > 0, targets == 0)
    ]
    true, positives = above[0], max(int(above[0][0]), 1)
    predicted = above[0] + above[1]
    precision = np.divide(true, predicted, out=np.full(len(true), np.nan), where=predicted > 0)
    recall = true / positives
    f1 = 2 * true / (predicted + positives)
    figure = new_figure(7, 3.6)
    axes = figure.subplots()
    for values, color, label in ((precision, BLUE, "precision"), (recall, ORANGE, "recall"), (f1, GREEN, "F1")):
        axes.plot(edges[:-1], 100 * values, color=color, label=label)
    best = int(f1.argmax())
    axes.axvline(edges[best], color=GREY, linewidth=0.8, label=f"best F1: {100 * f1[best]:.1f} at {edges[best]:.2f}")
    axes.set(xlabel="threshold", ylabel="%", ylim=(0, 102))
    tidy(axes)
    return figure


def _label_graph(targets: np.ndarray, classes: Sequence[str]) -> str:
    """Edges of the validation labels, as `mlfast graph` draws those of a data set."""
    chosen = np.sort(np.argsort(-(targets > 0).sum(axis=0), kind="stable")[:_GRAPH_CLASSES])
    counts = count_labels(torch.from_numpy(targets[:, chosen]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # labels without neighbours are not drawn
        graph = create_label_graph(counts)
    if not graph.edges:
        return "<p>No label is on 40 % of the images with another one.</p>"
    names = [str(classes[label])[:24] for label in chosen]
    figure = draw_label_graph(graph, conditional_probabilities(counts), names)
    return (
        "<p>An arrow from one label to another: of the images with the first, at least 40 % have the second; the "
        f"darker, the more.</p>{_inline(png(figure, dpi=80))}"
    )


def _cooccurrence(scores: np.ndarray, targets: np.ndarray, classes: Sequence[str]) -> Any:
    chosen = np.argsort(-(targets > 0).sum(axis=0), kind="stable")[:_MATRIX_CLASSES]
    figure = new_figure(11, 5.5)
    panels = ("in the labels", targets > 0), ("as predicted, at threshold 0.5", scores >= _THRESHOLD)
    for axes, (title, present) in zip(figure.subplots(1, 2), panels, strict=True):
        present = present[:, chosen].astype(np.float32)
        together = present.T @ present
        share = together / np.maximum(np.diag(together)[:, None], 1)
        np.fill_diagonal(share, np.nan)
        picture = axes.imshow(share, vmin=0, vmax=1, cmap="Blues")
        names = [str(classes[label])[:16] for label in chosen]
        axes.set(title=title, xticks=range(len(names)), yticks=range(len(names)))
        axes.set_xticklabels(names, rotation=90, fontsize=6)
        axes.set_yticklabels(names, fontsize=6)
    figure.colorbar(picture, ax=figure.axes, shrink=0.7)
    return figure


def _gallery(mistakes: list[Mistake], classes: Sequence[str]) -> str:
    if not mistakes:
        return "<p>None.</p>"
    figures = []
    for mistake in mistakes:
        truth = ", ".join(str(classes[label]) for label in (mistake.targets > 0).nonzero().flatten().tolist())
        caption = f"<b>{html.escape(str(classes[mistake.label]))}</b> {100 * mistake.probability:.1f}%"
        details = html.escape(f"{mistake.name}; labels: {truth or 'none'}")
        figures.append(
            f"<figure>{_inline_image(mistake.image)}<figcaption>{caption}<br>{details}</figcaption></figure>"
        )
    return f"<div class=errors>{''.join(figures)}</div>"


def _inline(data: bytes, kind: str = "png") -> str:
    return f'<img alt="" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


def _inline_image(image: Tensor) -> str:
    from PIL import Image

    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    factor = _PICTURE_SIZE / max(picture.size)
    picture = picture.resize((max(1, round(factor * picture.width)), max(1, round(factor * picture.height))))
    file = io.BytesIO()
    picture.save(file, format="jpeg", quality=85)
    return _inline(file.getvalue(), "jpeg")
