"""Does knowing which labels occur together help a graph branch? On the digits: ``python -m bench.label_vectors``.

A backbone learns to see on digits with *another* planted graph (seed 1), and is frozen. On its feature maps of a few
images of seed 0, heads are trained that differ in one thing only: what they are told about the labels. A run's images,
initial weights and order are the same for every head. The learning rate of each is the best of `RATES` on images that
are neither trained on nor scored. About 6 minutes of one core; what is done is kept in runs/label_vectors, and a call
goes on with what an earlier one began. Writes the table into docs/models.md.
"""

from __future__ import annotations

import json
import statistics
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import mlfast
from mlfast.data import DigitScenes
from mlfast.evaluation.metrics import multilabel_metrics
from mlfast.models import cooccurrence_vectors, count_labels, create_label_graph
from mlfast.models.backbone import extract_features
from mlfast.ops.reweight_pool import reweight_pool

KEPT = Path("runs/label_vectors")
PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- label vectors: written by python -m bench.label_vectors -->", "<!-- end of label vectors -->"
TRAINED_ON = (200,)  # numbers of images
SEEDS, TUNING_SEED = range(6), 100
RATES = (4e-3, 1.6e-2, 6.4e-2)
STEPS, BATCH, SCALE = 400, 64, 20.0


class Images(NamedTuple):
    """Frozen feature maps [N, S, h, w], and targets [N, K]."""

    features: Tensor
    targets: Tensor

    def __getitem__(self, rows: Tensor | slice) -> Images:  # type: ignore[override]
        return Images(self.features[rows], self.targets[rows])


class Labels(NamedTuple):
    """What a head is told: vectors [K, N] and Z [K, K]."""

    vectors: Tensor
    graph: Tensor


class Pooled(nn.Module):
    """The head ``gap``: mean, or with a graph branch (or a constant in its place) the weighted mean plus maximum."""

    def __init__(self, channels: int, num_classes: int, branch: mlfast.GraphBranch | Tensor | None) -> None:
        super().__init__()
        self.branch = branch
        self.classifier = mlfast.CosineLinear(channels, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``[B, S, h, w]`` to cosines ``[B, K]``."""
        if self.branch is None:
            return self.classifier(features.mean((2, 3)))
        weight = self.branch if isinstance(self.branch, Tensor) else self.branch.weight()
        return self.classifier(reweight_pool(features, weight))


# ------------------------------------------------------------------------------------------------- what labels are told


def _cooccurrence(targets: Tensor, pool: Tensor) -> Labels:
    counts = count_labels(targets)
    return Labels(cooccurrence_vectors(counts), create_label_graph(counts).matrix)


def _of_the_pool(targets: Tensor, pool: Tensor) -> Labels:
    return _cooccurrence(pool, pool)


def _shuffled(targets: Tensor, pool: Tensor) -> Labels:
    told = _cooccurrence(targets, pool)
    return told._replace(vectors=told.vectors[torch.randperm(len(told.vectors))])


def _random(targets: Tensor, pool: Tensor) -> Labels:
    """As long as the vectors from co-occurrence on average, in random directions."""
    told = _cooccurrence(targets, pool)
    drawn = torch.randn_like(told.vectors)
    return told._replace(vectors=drawn * (told.vectors.norm() / drawn.norm()))


def _blind(targets: Tensor, pool: Tensor) -> Labels:
    return Labels(_random(targets, pool).vectors, torch.eye(targets.shape[1]))


TOLD: dict[str, Callable[[Tensor, Tensor], Labels]] = {
    "co-occurrence": _cooccurrence,
    "co-occurrence of 9000 images' labels": _of_the_pool,
    "co-occurrence, given to the wrong labels": _shuffled,
    "random": _random,
    "random, and no edges": _blind,
}
HEADS: dict[str, Callable[[int, int, Labels], nn.Module]] = {
    "gat_reweight": lambda s, k, told: Pooled(s, k, mlfast.GraphBranch(*told, s)),
    "ml_gcn": lambda s, k, told: mlfast.MLGCN(s, k, vectors=told.vectors, graph=told.graph),
    "gatn": lambda s, k, told: mlfast.GATN(s, k, vectors=told.vectors),
}


def contestants() -> list[tuple[str, str]]:
    """Branch, and what it is told."""
    told = [(head, name) for head in HEADS for name in TOLD]
    told.remove(("gatn", "random, and no edges"))  # it has no edges but those of its vectors
    return [("none, mean", ""), ("none, mean + maximum", ""), *told]


def make_head(branch: str, told: str, train: Images, pool: Images) -> nn.Module:
    """A contestant's head for the images that it is trained on."""
    channels, num_classes = train.features.shape[1], train.targets.shape[1]
    if not told:
        return Pooled(channels, num_classes, None if branch == "none, mean" else torch.ones(channels))
    return HEADS[branch](channels, num_classes, TOLD[told](train.targets, pool.targets))


# ------------------------------------------------------------------------------------------------------------- training


def see(images: DigitScenes, epochs: int = 6) -> mlfast.models.MultilabelClassifier:
    """A model of all labels of a data set, whose backbone is kept."""
    torch.manual_seed(0)
    model = mlfast.create_model("test_resnet", len(images.classes), scale=SCALE)
    rows = torch.cat([torch.randperm(len(images)) for _ in range(epochs)]).split(BATCH)
    _descend(model, ((model.prepare(_shift(images.images[i])), images.targets[i]) for i in rows), len(rows), 4e-3)
    return model.eval()


def _shift(images: Tensor) -> Tensor:
    dx, dy = (int(x) for x in torch.randint(-3, 4, (2,)))
    return images.roll((dx, dy), (2, 3))


def _descend(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], steps: int, rate: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.2)
    loss = mlfast.AAMLoss(scale=SCALE, reduction="batchmean")
    for x, target in batches:
        optimizer.zero_grad()
        loss(model(x), target).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def frozen(model: mlfast.models.MultilabelClassifier, images: DigitScenes) -> Images:
    """Feature maps of all images."""
    maps = [extract_features(model.backbone, model.prepare(chunk)) for chunk in images.images.split(500)]
    return Images(torch.cat(maps), images.targets)


def run(name: tuple[str, str], pool: Images, score_on: Images, count: int, seed: int, rate: float) -> float:
    """mAP in percent after training on some images of the pool."""
    torch.manual_seed(seed)
    train = pool[torch.randperm(len(pool.targets))[:count]]
    rows = torch.randint(count, (STEPS, BATCH))
    head = make_head(*name, train, pool)
    _descend(head, (train[i] for i in rows), STEPS, rate)
    with torch.no_grad():
        return 100 * multilabel_metrics(head.eval()(score_on.features), score_on.targets).mAP


def compare(name: tuple[str, str], parts: Sequence[Images], count: int) -> tuple[float, list[float]]:
    """The rate, and the mAP of every seed."""
    pool, held_out, val = parts
    rate = max(RATES, key=lambda rate: run(name, pool, held_out, count, TUNING_SEED, rate))
    return rate, [run(name, pool, val, count, seed, rate) for seed in SEEDS]


def prepared() -> list[Images]:
    """Pool, held out and val, on features that were learned on other scenes."""
    path = KEPT / "features.pt"
    if not path.exists():
        model = see(DigitScenes("train", 8000, seed=1))
        train, val = (frozen(model, DigitScenes(split)) for split in ("train", "val"))
        KEPT.mkdir(parents=True, exist_ok=True)
        torch.save([tuple(part) for part in (train[slice(1000, None)], train[slice(0, 1000)], val)], path)
    return [Images(*part) for part in torch.load(path)]


# ---------------------------------------------------------------------------------------------------------------- table


def table(results: dict[str, tuple[float, list[float]]]) -> str:
    """Mean and spread over the seeds, and against the same branch with random vectors and the same edges."""
    titles = ["branch", "label vectors"]
    for count in TRAINED_ON:
        titles += [f"{count} images", "against random"]
    lines = [titles, ["---"] * len(titles)]
    for branch, told in contestants():
        cells = [branch, told]
        for count in TRAINED_ON:
            scores = results[_key(count, branch, told)][1]
            other = results.get(_key(count, branch, "random"))
            cells.append(f"{statistics.mean(scores):.1f} ± {statistics.stdev(scores):.1f}")
            cells.append("" if other is None or told == "random" else _difference(scores, other[1]))
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _key(count: int, branch: str, told: str) -> str:
    return f"{count} images, {branch}, {told}"


def _difference(ours: list[float], theirs: list[float]) -> str:
    """Mean over the seeds of the difference of two runs on the same images, and the standard error of this mean."""
    pairs = [a - b for a, b in zip(ours, theirs, strict=True)]
    return f"{statistics.mean(pairs):+.1f} ± {statistics.stdev(pairs) / len(pairs) ** 0.5:.1f}"


def main() -> None:
    """Run what is not done, and write the table."""
    warnings.filterwarnings("ignore", ".*no neighbour")
    torch.set_num_threads(1)  # nothing here gains from more
    parts = prepared()
    path = KEPT / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for count in TRAINED_ON:
        for name in contestants():
            key = _key(count, *name)
            if key not in results:
                results[key] = compare(name, parts, count)
                path.write_text(json.dumps(results, indent=1))
                print(key, results[key][0], *(f"{score:.1f}" for score in results[key][1]), flush=True)
    before, after = PAGE.read_text().split(BEGIN)[0], PAGE.read_text().split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{after}")


if __name__ == "__main__":
    main()
