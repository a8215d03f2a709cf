"""What each part of the method brings: Table 7's ladder and a comparison of the losses, on the built-in digits."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import mlfast
from mlfast.models.checkpoint import atomic_write, write_text
from mlfast.training.config import TrainConfig
from mlfast.training.drawing import BLUE, GREEN, GREY, ORANGE, new_figure, png, tidy

_MARKS = "<!-- results -->", "<!-- end of results -->"

_SAM = {"sam_rho": 0.05}
_DECODER = {"head": "ml_decoder", "head_args": {"embed_dim": 128, "feedforward_dim": 256}}
_BCE = {"loss": "bce", "lr": 0.2}
_ASL = {"loss": "asl", "lr": 0.2, "gamma_neg": 4.0, "prob_shift": 0.05}
_AM = {"loss": "aam", "lr": 0.5, "gamma_neg": 0.0}
_AAM = {"loss": "aam", "lr": 0.5, "gamma_neg": 1.0}
_SETTINGS = {"scale": 20.0, "k": 0.7, "gamma_pos": 0.0, "ema_decay": 0.0, "report": False}

# docs/ablation.md says how the rates were chosen.
LADDER: dict[str, dict[str, Any]] = {
    "baseline: BCE, average pooling": _BCE,
    "+ SAM": _BCE | _SAM,
    "+ ML-Decoder": _BCE | _SAM | _DECODER | {"lr": 0.05},
    "+ AM loss": _AM | _SAM | _DECODER,
    "+ AAM loss": _AAM | _SAM | _DECODER,
    "graph attention in place of ML-Decoder": _AAM | _SAM | {"graph": "gat_reweight"},
}
LOSSES: dict[str, dict[str, Any]] = {"BCE": _BCE, "ASL": _ASL, "AM": _AM, "AAM": _AAM}


@dataclass(frozen=True)
class Row:
    """A line of the table: the mAP after the last epoch for each seed, in percent."""

    table: str
    name: str
    lr: float
    scores: list[float]

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds, nan for one."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else math.nan


def run_ablation(seeds: int, epochs: int, images: int, runs_dir: str, say: Callable[[str], None] = print) -> list[Row]:
    """Train every configuration with every seed, and finish what an earlier call with the same arguments began.

    Args:
        seeds: number of seeds, from 0 on.
        epochs, images: of each run; the mAP is that of the last epoch's weights on 1000 validation images.
        runs_dir: where the runs are kept.
        say: takes a line after each run.
    """
    from mlfast.training.fit import fit

    rows = [Row("ladder", name, settings["lr"], []) for name, settings in LADDER.items()]
    rows += [Row("losses", name, settings["lr"], []) for name, settings in LOSSES.items()]
    for seed in range(seeds):  # the outer loop, so that a call that is stopped has every configuration soon
        done: dict[str, float] = {}  # the losses begin with the ladder's baseline
        for number, (row, settings) in enumerate(zip(rows, [*LADDER.values(), *LOSSES.values()], strict=True)):
            if str(settings) not in done:
                config = TrainConfig(
                    **_SETTINGS | settings,
                    epochs=epochs,
                    train_images=images,
                    seed=seed,
                    runs_dir=runs_dir,
                    name=f"{number}-seed{seed}-{epochs}x{images}",
                )
                done[str(settings)] = 100 * fit(config, resume=True, quiet=True).history[-1]["mAP"]
            row.scores.append(done[str(settings)])
            say(f"{row.table}: {row.name}, seed {seed}: mAP {row.scores[-1]:.1f}")
    return rows


def write_results(rows: list[Row], settings: str, folder: Path) -> None:
    """Put the tables into ``ablation.md`` in the folder, in place of older ones, and draw ``ablation.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "ablation.md"
    text = page.read_text() if page.exists() else f"# Ablation\n\n{_MARKS[0]}\n{_MARKS[1]}\n"
    before, rest = text.split(_MARKS[0], 1)
    after = rest.split(_MARKS[1], 1)[1]
    write_text(page, f"{before}{_MARKS[0]}\n{settings}\n\n{_table(rows)}\n{_MARKS[1]}{after}")
    with atomic_write(folder / "ablation.png") as file:
        file.write(png(_picture(rows)))


def _table(rows: list[Row]) -> str:
    lines = ["| | lr | mAP, mean | spread | each seed |", "|---|---|---|---|---|"]
    for table in ("ladder", "losses"):
        title = {"ladder": "**Ladder of Table 7**", "losses": "**Losses**, average pooling, no SAM"}[table]
        lines.append(f"| {title} | | | | |")
        for row in rows:
            if row.table == table:
                seeds = ", ".join(f"{score:.1f}" for score in row.scores)
                spread = "-" if math.isnan(row.spread) else f"{row.spread:.1f}"
                lines.append(f"| {row.name} | {row.lr:g} | {statistics.mean(row.scores):.1f} | {spread} | {seeds} |")
    return "\n".join(lines)


def _picture(rows: list[Row]) -> Any:
    figure = new_figure(9, 3.4)
    for axes, table in zip(figure.subplots(1, 2), ("ladder", "losses"), strict=True):
        chosen = [row for row in rows if row.table == table][::-1]
        axes.barh([row.name for row in chosen], [statistics.mean(row.scores) for row in chosen], color=BLUE, height=0.6)
        for place, row in enumerate(chosen):
            axes.plot(row.scores, [place] * len(row.scores), "o", color=ORANGE, markersize=4)
        axes.set(xlabel="mAP, %; dots: each seed", title={"ladder": "the ladder", "losses": "losses"}[table])
        tidy(axes)
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
