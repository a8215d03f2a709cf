"""The record of a run: one JSON line an epoch, and one picture."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from mlfast.files import atomic_write, write_text
from mlfast.models.checkpoint import CheckpointError
from mlfast.training.drawing import BLUE, GREEN, GREY, ORANGE, new_figure, png, tidy

Record = dict[str, Any]


class History:
    """The epochs of a run, kept in a file ``metrics.jsonl`` with one JSON object a line.

    Keys of a line: ``epoch`` (from 1), ``loss`` (training, per image), ``lr`` (at the end), ``images_per_second``,
    ``data_seconds`` (that training waited for batches), ``compute_seconds`` (the rest of training), ``seconds``, then
    ``val_loss``, ``mAP``, ``OF1``, ... of the trained weights, and the same with ``ema_`` in front for their average.
    A value that is not finite is null.

    Args:
        path: the file; it is touched by `restore` and `append` only.
        tensorboard: write the numbers for TensorBoard too, in a folder beside the file.
        writes: whether files are touched at all; of several processes only one may.
    """

    def __init__(self, path: Path, tensorboard: bool = False, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        self.records: list[Record] = []
        self._board = _tensorboard_writer(path.parent / "tensorboard") if tensorboard and writes else None

    def restore(self, epochs: int) -> None:
        """Take over the first epochs of the file and cut off the rest: a killed run may have left half a line.

        Raises:
            CheckpointError: the file is missing or damaged, or epochs are missing in it.
        """
        try:
            lines = self.path.read_text().splitlines()[:epochs] if epochs else []
            self.records = [json.loads(line) for line in lines]
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path} cannot be read ({error}); put that of the run back") from error
        if len(lines) < epochs:
            raise CheckpointError(f"{self.path} has {len(lines)} of {epochs} epochs; put that of the run back")
        if self.writes:
            write_text(self.path, "".join(line + "\n" for line in lines))

    def append(self, record: Record) -> None:
        """Add an epoch, in memory and on disk."""
        record = {key: _finite(value) for key, value in record.items()}
        self.records.append(record)
        if not self.writes:
            return
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())  # the state that counts this epoch comes later
        if self._board:
            for key, value in record.items():
                if value is not None and key != "epoch":
                    self._board.add_scalar(key, value, record["epoch"])
            self._board.flush()

    def plot(self, path: Path) -> None:
        """Draw loss and mAP over the epochs into a PNG file."""
        with atomic_write(path) as file:
            file.write(png(curves(self.records)))


def _finite(value: Any) -> Any:
    """None for NaN and infinity, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _tensorboard_writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ModuleNotFoundError(
            'tensorboard: true needs tensorboard: pip install ".[tensorboard]" in a checkout of mlfast',
            name="tensorboard",
        ) from error
    return SummaryWriter(str(folder))


def curves(records: list[Record]) -> Any:
    """A figure of loss (left) and mAP in percent (right) over the epochs."""
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(10, 4)
    left, right = figure.subplots(1, 2)
    _curve(left, records, "loss", 1, label="training", color=BLUE)
    _curve(left, records, "val_loss", 1, label="validation", color=ORANGE)
    _curve(left, records, "ema_val_loss", 1, label="validation, EMA", color=GREEN)
    left.set(title="loss per image", xlabel="epoch")
    left.set_ylim(bottom=0)
    _curve(right, records, "mAP", 100, label="weights", color=ORANGE)
    _curve(right, records, "ema_mAP", 100, label="EMA", color=GREEN)
    right.set(title="validation mAP, %", xlabel="epoch", ylim=(0, 100))
    decides = "held_out_" if any("held_out_mAP" in record for record in records) else ""
    if decides:
        _curve(right, records, "held_out_mAP", 100, label="weights, held out", color=BLUE)
        _curve(right, records, "held_out_ema_mAP", 100, label="EMA, held out", color=GREY)
    _mark_best(right, records, decides)
    for axes in (left, right):
        tidy(axes)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _curve(axes: Any, records: list[Record], key: str, factor: float, *, label: str, color: str) -> None:
    points = [(record["epoch"], factor * record[key]) for record in records if record.get(key) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, color=color, linewidth=1.8, marker="o", markersize=3.5)


def _mark_best(axes: Any, records: list[Record], prefix: str) -> None:
    keys = (f"{prefix}mAP", f"{prefix}ema_mAP")
    points = [(record[key], record["epoch"]) for record in records for key in keys if record.get(key)]
    if points:
        value, epoch = max(points)
        axes.annotate(
            f"best {100 * value:.1f}",
            (epoch, 100 * value),
            xytext=(0, -22),
            textcoords="offset points",
            ha="right",
            arrowprops={"arrowstyle": "-", "color": GREY},
        )
