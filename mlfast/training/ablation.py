"""What each part of the method brings, measured on the built-in digits.

Table 7's ladder, a comparison of the losses, and the sweeps of Figures 3 and 4 (scale, margin) and Table 8 (gammas).
`mlfast.training.ablation_page` writes the tables and draws the pictures.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlfast.training.config import TrainConfig

Settings = dict[str, Any]
Key = tuple[str, str]  # loss; head or graph: what has a learning rate of its own

# Images of 32 pixels and a stride of 8: ML-Decoder has 16 positions to look at, and a run takes half a minute.
_COMMON: Settings = {
    "image_size": 32,
    "backbone_args": {"output_stride": 8},
    "batch_size": 32,
    "ema_decay": 0.0,
    "report": False,
}
_BCE: Settings = {"loss": "bce"}
_ASL: Settings = {"loss": "asl", "gamma_neg": 4.0, "prob_shift": 0.05}
_AAM: Settings = {"loss": "aam", "gamma_neg": 1.0}
_AM: Settings = {"loss": "aam", "gamma_neg": 0.0}
_SAM: Settings = {"sam_rho": 0.05}
_DECODER: Settings = {"head": "ml_decoder", "head_args": {"embed_dim": 64, "feedforward_dim": 128}}
_GRAPH: Settings = {"graph": "gat_reweight"}

TABLES: dict[str, dict[str, Settings]] = {
    "ladder": {
        "baseline: BCE, average pooling": _BCE,
        "+ SAM": _BCE | _SAM,
        "+ ML-Decoder": _BCE | _SAM | _DECODER,
        "+ AM loss": _AM | _SAM | _DECODER,
        "+ AAM loss": _AAM | _SAM | _DECODER,
        "graph attention in place of ML-Decoder": _AAM | _SAM | _GRAPH,
    },
    "losses": {"BCE": _BCE, "ASL": _ASL, "AM": _AM, "AAM": _AAM},
    "scale": {f"s = {scale:g}": _AAM | {"scale": scale} for scale in (5.0, 10.0, 20.0, 40.0)},
    "margin": {f"m = {margin:g}": _AAM | {"margin": margin} for margin in (0.0, 0.1, 0.2, 0.3)},
    "gammas": {
        f"gamma_neg = {negative:g}, gamma_pos = {positive:g}": _AAM | {"gamma_neg": negative, "gamma_pos": positive}
        for negative, positive in ((0.0, 0.0), (1.0, 0.0), (2.0, 0.0), (2.0, 1.0), (4.0, 0.0))
    },
}
_PARTS = (("ladder", "losses"), ("scale", "margin", "gammas"))  # the first is done with every seed before the second

# Where the search for the rate of each loss and head begins; it goes on by factors of 3.
FIRST_RATES: dict[Key, float] = {
    ("bce", "gap"): 0.1,
    ("bce", "ml_decoder"): 0.03,
    ("asl", "gap"): 0.1,
    ("aam", "gap"): 0.5,
    ("aam", "ml_decoder"): 0.5,
    ("aam", "gat_reweight"): 0.5,
}
_FACTOR = 3.0
_TUNING: Settings = {"seed": 1000, "held_out": 0.2, "val_images": 64}  # rates are chosen by images held out of train


@dataclass
class Row:
    """A line of a table: its learning rate, and the mAP in percent after the last epoch for each seed so far."""

    table: str
    name: str
    lr: float = math.nan
    scores: list[float] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """Over the seeds; nan where nothing was measured."""
        return statistics.mean(self.scores) if self.scores else math.nan

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds, nan for less than two."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else math.nan


@dataclass(frozen=True)
class Results:
    """What was measured.

    Attributes:
        rows: of all tables, in order.
        rates: the rates tried for each loss and head, with the mAP in percent on the held-out images.
        complete: whether nothing is left to do.
    """

    rows: list[Row]
    rates: dict[Key, dict[float, float]]
    complete: bool


class _OutOfTime(Exception):
    pass


class Ablation:
    """Trains what the tables need, each configuration once, and never again what lies in the folder of the runs.

    Args:
        seeds: number of seeds, from 0 on.
        epochs, images: of each run; the mAP is that of the last epoch's weights on 1000 validation images.
        runs_dir: where the runs are kept.
        minutes: begin no further run after these; a later call goes on.
        say: takes a line after each run.
    """

    def __init__(
        self,
        seeds: int,
        epochs: int,
        images: int,
        runs_dir: str,
        minutes: float = math.inf,
        say: Callable[[str], None] = print,
    ) -> None:
        self.seeds, self.say = seeds, say
        self.common = _COMMON | {"epochs": epochs, "train_images": images, "runs_dir": runs_dir}
        self.end = time.monotonic() + 60 * minutes

    def run(self) -> Results:
        """Search for the rates, then train every row with every seed; only what is finished when the time is over."""
        rows = {(table, name): Row(table, name) for table, names in TABLES.items() for name in names}
        rates: dict[Key, dict[float, float]] = {key: {} for key in FIRST_RATES}
        complete = True
        found = set()
        for key in FIRST_RATES:
            with contextlib.suppress(_OutOfTime):
                rates[key].update(self._search(key))
                found.add(key)
        for table, name, seed in self._order():
            row, settings = rows[table, name], TABLES[table][name]
            try:
                if _key(settings) not in found:
                    raise _OutOfTime
                row.lr = _best(rates[_key(settings)])
                row.scores.append(self._score(settings | {"lr": row.lr, "seed": seed}, "mAP"))
            except _OutOfTime:
                complete = False
        return Results(list(rows.values()), rates, complete)

    def _order(self) -> Iterator[tuple[str, str, int]]:
        for part in _PARTS:
            for seed in range(self.seeds):
                yield from ((table, name, seed) for table in part for name in TABLES[table])

    def _search(self, key: Key) -> Iterator[tuple[float, float]]:
        """Rates and their scores: the first guess and its neighbours, then on while an end of the row is the best."""
        settings = next(one for rows in TABLES.values() for one in rows.values() if _key(one) == key)
        settings = {name: value for name, value in settings.items() if name != "sam_rho"} | _TUNING
        scores: dict[float, float] = {}
        waiting = [FIRST_RATES[key] * _FACTOR**step for step in (0, -1, 1)]
        while waiting:
            rate = float(f"{waiting.pop(0):.2g}")
            scores[rate] = self._score(settings | {"lr": rate}, "held_out_mAP")
            yield rate, scores[rate]
            if not waiting and _best(scores) in (min(scores), max(scores)):
                waiting = [_best(scores) * (_FACTOR if _best(scores) == max(scores) else 1 / _FACTOR)]

    def _score(self, settings: Settings, metric: str) -> float:
        """The metric after the last epoch, in percent, of a finished run or a new one; 0 where the loss diverged."""
        config = TrainConfig(**self.common | settings)
        text = json.dumps(config.to_dict() | {"runs_dir": "", "name": ""}, sort_keys=True)
        config = replace(config, name=hashlib.sha256(text.encode()).hexdigest()[:16])
        score = _finished(config, metric)
        if score is None:
            if time.monotonic() > self.end:
                raise _OutOfTime
            score = _train(config, metric)
            told = {name: value for name, value in settings.items() if name not in ("head_args", "val_images")}
            self.say(f"{' '.join(f'{name}={value}' for name, value in told.items())}: {metric} {100 * score:.1f}")
        return 100 * score


def _key(settings: Settings) -> Key:
    return settings["loss"], settings.get("graph") or settings.get("head", "gap")


def _best(scores: dict[float, float]) -> float:
    return max(scores, key=lambda rate: scores[rate])


def _folder(config: TrainConfig) -> Path:
    return Path(config.runs_dir).expanduser() / str(config.name)


def _finished(config: TrainConfig, metric: str) -> float | None:
    """What an earlier call reached with these settings, which the name of the run stands for."""
    folder = _folder(config)
    if (folder / "diverged").exists():
        return 0.0
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return float(json.loads(lines[-1])[metric]) if len(lines) == config.epochs else None


def _train(config: TrainConfig, metric: str) -> float:
    from mlfast.training.errors import Diverged
    from mlfast.training.fit import fit

    try:
        return float(fit(config, resume=True, quiet=True).history[-1][metric])
    except Diverged:
        (_folder(config) / "diverged").touch()
        return 0.0
