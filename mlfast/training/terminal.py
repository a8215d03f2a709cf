"""What a run shows on the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mlfast.evaluation.metrics import SCORES
from mlfast.training.config import TrainConfig
from mlfast.training.history import Record

_HELD_OUT = (("held_out_mAP", 8, "{:.1f}", 100), ("held_out_ema_mAP", 12, "{:.1f}", 100))  # where there are such images
_COLUMNS = (
    ("epoch", 5, "{:d}", 1),
    ("loss", 8, "{:.4f}", 1),
    ("val_loss", 8, "{:.4f}", 1),
    ("mAP", 6, "{:.1f}", 100),
    ("OF1", 6, "{:.1f}", 100),
    ("CF1", 6, "{:.1f}", 100),
    ("ema_mAP", 7, "{:.1f}", 100),
    *_HELD_OUT,
    ("images_per_second", 8, "{:.0f}", 1),
    ("seconds", 7, "{:.1f}", 1),
    ("data_seconds", 7, "{:.1f}", 1),
    ("compute_seconds", 9, "{:.1f}", 1),
)
_TITLES = {
    "val_loss": "val loss",
    "ema_mAP": "EMA mAP",
    "held_out_mAP": "held-out",
    "held_out_ema_mAP": "EMA held-out",
    "images_per_second": "images/s",
    "data_seconds": "waiting",
    "compute_seconds": "computing",
}

DEMO_BACKBONE = (
    "note   test_resnet is the small network of the demo; --backbone NAME takes another of timm's, "
    "--pretrained true its weights\n"
)

BAR_FORMAT = "{desc} {percentage:3.0f}% |{bar:20}| {n_fmt}/{total_fmt} steps, {remaining} left{postfix}"


def introduction(config: TrainConfig, data: str, num_classes: int, device: torch.device, begun: int) -> str:
    """What is about to be trained, in two lines or three; ``begun`` is the number of finished epochs."""
    weights = "timm's weights" if config.pretrained else config.weights or "random"
    start = f"continued after epoch {begun}" if begun else f"initial weights: {weights}"
    graph = f", graph {config.graph}" if config.graph != "none" else ""
    length = f"{config.steps} steps" if config.steps else f"{config.epochs} epochs"
    return (
        f"data   {data}; {num_classes} classes\n"
        f"model  {config.backbone}, head {config.head}{graph}, {start}; loss {config.loss}; "
        f"{config.optimizer}, lr {config.lr:g}, {length}; {device}, {config.precision}\n"
        f"{DEMO_BACKBONE if config.backbone == 'test_resnet' and config.data != 'digits' else ''}"
    )


def header(held_out: bool) -> str:
    """The titles over the lines of `epoch_line`."""
    return "  ".join(f"{_TITLES.get(key, key):>{width}}" for key, width, _, _ in _columns(held_out))


def _columns(held_out: bool) -> list[tuple[str, int, str, int]]:
    return [column for column in _COLUMNS if held_out or column not in _HELD_OUT]


def postfix(loss: float, lr: float, norm: float, speed: float) -> str:
    """What stands behind the bar; memory is the most that the run has taken so far."""
    memory = f"{_most_memory() / 2**30:.1f} GiB"
    return f"loss {loss:.4f}, lr {lr:.2g}, gradient {norm:.2g}, {speed:.0f} images/s, {memory}"


def _most_memory() -> int:
    """Bytes: of a GPU's tensors where one is used, else of this process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def epoch_line(record: Record) -> str:
    """One epoch in one line; scores in percent."""
    columns = _columns("held_out_mAP" in record)
    return "  ".join(f"{_number(record.get(key), form, factor):>{width}}" for key, width, form, factor in columns)


def result_table(records: list[Record], best: dict[str, Any]) -> str:
    """Final scores in percent: the trained weights, their average, and the epoch which was kept as best.

    Where images were held out, a column has the figure that decided which is best.
    """
    held_out = "held_out_mAP" in records[-1]
    rows = [("last weights", records[-1], "")]
    if "ema_mAP" in records[-1]:
        rows.append(("last EMA", records[-1], "ema_"))
    if best["epoch"]:
        source = "EMA" if best["prefix"] else "weights"
        by = " by held-out mAP" if held_out else ""
        rows.append((f"best{by}: {source}, epoch {best['epoch']}", records[best["epoch"] - 1], best["prefix"]))
    width = max(len(title) for title, _, _ in rows)
    lines = [" " * width + "".join(f"{score:>7}" for score in SCORES) + ("  held-out mAP" if held_out else "")]
    for title, record, prefix in rows:
        cells = [f"{_number(record.get(prefix + score), '{:.1f}', 100):>7}" for score in SCORES]
        if held_out:
            cells.append(f"{_number(record.get(f'held_out_{prefix}mAP'), '{:.1f}', 100):>14}")
        lines.append(f"{title:<{width}}" + "".join(cells))
    return "\n".join(lines)


def summary(run_dir: Path, records: list[Record], best: dict[str, Any]) -> str:
    """The table and where everything lies."""
    report = f"\nreport   {run_dir / 'report.html'}" if (run_dir / "report.html").exists() else ""
    model = run_dir / ("best" if best["epoch"] else "last")
    return (
        f"\n{result_table(records, best)}\n\n"
        f"model    {model}\nmetrics  {run_dir / 'metrics.jsonl'}\npicture  {run_dir / 'curves.png'}{report}"
    )


def _number(value: float | None, form: str, factor: float) -> str:
    return "-" if value is None or value != value else form.format(factor * value)
