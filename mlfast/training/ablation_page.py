"""The tables and pictures of an ablation, and the losses over the cosine."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import mlfast
from mlfast.files import atomic_write, write_text
from mlfast.training.ablation import Results, Row
from mlfast.training.drawing import BLUE, GREEN, GREY, ORANGE, new_figure, png, tidy

_MARKS = "<!-- results -->", "<!-- end of results -->"
_TITLES = {
    "ladder": "**Ladder of Table 7**",
    "losses": "**Losses**, average pooling, no SAM",
    "scale": "**Scale** (Figure 3), AAM, average pooling, no SAM",
    "margin": "**Margin** (Figure 4), the same",
    "gammas": "**Gammas** (Table 8), the same",
}


def write_results(results: Results, settings: str, folder: Path) -> None:
    """Put the tables into ``ablation.md`` in the folder, in place of older ones, and draw the pictures beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "ablation.md"
    text = page.read_text() if page.exists() else f"# Ablation\n\n{_MARKS[0]}\n{_MARKS[1]}\n"
    before, rest = text.split(_MARKS[0], 1)
    after = rest.split(_MARKS[1], 1)[1]
    tables = f"{settings}\n\n{_table(results.rows)}\n\n{_rates(results)}"
    write_text(page, f"{before}{_MARKS[0]}\n{tables}\n{_MARKS[1]}{after}")
    for name, figure in (("ablation", _bars(results.rows)), ("ablation-sweeps", _sweeps(results.rows))):
        with atomic_write(folder / f"{name}.png") as file:
            file.write(png(figure))


def _table(rows: list[Row]) -> str:
    lines = ["| | lr | mAP, mean | spread | each seed |", "|---|---|---|---|---|"]
    for table, title in _TITLES.items():
        lines.append(f"| {title} | | | | |")
        for row in rows:
            if row.table == table:
                seeds = ", ".join(f"{score:.1f}" for score in row.scores) or "not measured"
                numbers = f"{_number(row.lr, 'g')} | {_number(row.mean)} | {_number(row.spread)}"
                lines.append(f"| {row.name} | {numbers} | {seeds} |")
    return "\n".join(lines)


def _rates(results: Results) -> str:
    lines = ["| search for the rate | mAP on held-out images at each rate tried |", "|---|---|"]
    for (loss, head), scores in results.rates.items():
        tried = ", ".join(f"{rate:g}: {scores[rate]:.1f}" for rate in sorted(scores))
        lines.append(f"| {loss}, {head} | {tried or 'not measured'} |")
    return "\n".join(lines)


def _number(value: float, form: str = ".1f") -> str:
    return "-" if math.isnan(value) else format(value, form)


def _bars(rows: list[Row]) -> Any:
    figure = new_figure(9, 3.4)
    for axes, table in zip(figure.subplots(1, 2), ("ladder", "losses"), strict=True):
        chosen = [row for row in rows if row.table == table][::-1]
        means = [0.0 if math.isnan(row.mean) else row.mean for row in chosen]
        axes.barh([row.name for row in chosen], means, color=BLUE, height=0.6)
        for place, row in enumerate(chosen):
            axes.plot(row.scores, [place] * len(row.scores), "o", color=ORANGE, markersize=4)
        axes.set(xlabel="mAP, %; dots: each seed", title={"ladder": "the ladder", "losses": "losses"}[table])
        tidy(axes)
    return figure


def _sweeps(rows: list[Row]) -> Any:
    figure = new_figure(11, 3.4)
    for axes, table in zip(figure.subplots(1, 3, sharey=True), ("scale", "margin", "gammas"), strict=True):
        chosen = [row for row in rows if row.table == table]
        axes.plot([row.mean for row in chosen], color=BLUE)
        for place, row in enumerate(chosen):
            axes.plot([place] * len(row.scores), row.scores, "o", color=ORANGE, markersize=4)
        names = [re.sub(r"\w+ = ", "", row.name) for row in chosen]
        axes.set_xticks(range(len(names)), names)
        axes.set(title={"scale": "s", "margin": "m", "gammas": "gamma_neg, gamma_pos"}[table])
        tidy(axes)
    figure.axes[0].set_ylabel("mAP, %; dots: each seed")
    return figure


def draw_loss_curves(path: Path, scale: float = 23.0) -> None:
    """The paper's Figure 2: loss and gradient of one label over its cosine, for a positive and a negative.

    AM and AAM take the cosine with ``k = 0.7`` (AAM: ``gamma_neg = 2, gamma_pos = 1``); BCE and ASL (``gamma_neg = 4``,
    clip 0.05) take ``scale * cosine`` as their logit, divided by the scale, which is what makes them comparable.
    """
    cosine = torch.linspace(-1, 1, 401)
    am = mlfast.AAMLoss(scale, 0.0, 0.7, 0.0, 0.0, reduction="none")
    aam = mlfast.AAMLoss(scale, 0.0, 0.7, 2.0, 1.0, reduction="none")
    bce = mlfast.AsymmetricLoss(0.0, 0.0, clip=0.0, reduction="none")
    asl = mlfast.AsymmetricLoss(4.0, 0.0, clip=0.05, reduction="none")
    losses: list[tuple[str, str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]] = [
        ("BCE", GREY, lambda x, y: bce(scale * x, y) / scale),
        ("ASL", GREEN, lambda x, y: asl(scale * x, y) / scale),
        ("AM", ORANGE, am),
        ("AAM", BLUE, aam),
    ]
    figure = new_figure(9, 6)
    for column, (title, target) in enumerate((("positive", 1.0), ("negative", 0.0))):
        upper, lower = (figure.add_subplot(2, 2, 1 + column + 2 * row) for row in range(2))
        for label, color, loss in losses:
            x = cosine.clone().requires_grad_()
            value = loss(x, torch.full_like(x, target))
            (slope,) = torch.autograd.grad(value.sum(), x)
            upper.plot(cosine, value.detach(), color=color, label=label)
            lower.plot(cosine, slope.abs(), color=color, label=label)
        upper.set(title=f"a {title}", ylabel="loss")
        lower.set(xlabel="cosine", ylabel="size of the gradient")
        tidy(upper)
        tidy(lower)
    with atomic_write(path) as file:
        file.write(png(figure))
