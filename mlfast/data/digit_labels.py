"""Which labels a digit scene carries: scene types, and a planted co-occurrence graph.

An image is of one hidden scene type. The type has a profile over the 40 classes, from which 0 to 3 first labels are
drawn. Every edge i -> j of the planted graph is then live with its own probability, independently of all the others,
and a label that is present brings in what its live edges point to, and so on. So P(j | i) is at least the planted
probability, whatever brought i in; only the limit of `MAX_LABELS` per image takes a little away.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

COLOURS = ("red", "green", "blue", "yellow")
CLASSES = tuple(f"{colour} {digit}" for colour in COLOURS for digit in range(10))
NUM_CLASSES = len(CLASSES)

NUM_EDGES = 40
NUM_LAYERS = 3
EDGE_PROBABILITY = (0.5, 0.8)
NUM_SCENES = 6
# P(0, 1, 2, 3 first labels). With what the edges bring in this makes about 3 labels an image.
FIRST_LABELS = (0.02, 0.50, 0.40, 0.08)
# What still fits on an image without the digits hiding each other.
MAX_LABELS = 6

# A stream of random numbers is named by (seed, purpose, ...); the purposes must differ, not mean anything.
_STREAM_GRAPH, _STREAM_SCENES = 11, 12


@dataclass(frozen=True)
class LabelModel:
    """What decides the labels: edges `source -> target` with a probability each, and a profile [scenes, K] per type."""

    source: np.ndarray
    target: np.ndarray
    probability: np.ndarray
    profiles: np.ndarray


def label_model(seed: int) -> LabelModel:
    """The label model of `seed`. Training and validation images of one seed share it."""
    source, target, probability = _draw_edges(np.random.default_rng([seed, _STREAM_GRAPH]))
    rng = np.random.default_rng([seed, _STREAM_SCENES])
    # The uniform part keeps the rarest class above one percent of the images.
    profiles = 0.5 * rng.dirichlet(np.full(NUM_CLASSES, 0.5), NUM_SCENES) + 0.5 / NUM_CLASSES
    return LabelModel(source, target, probability, profiles)


def graph_matrix(seed: int) -> np.ndarray:
    """[K, K] float64: entry (i, j) is the planted P(j | i), zero without an edge."""
    model = label_model(seed)
    matrix = np.zeros((NUM_CLASSES, NUM_CLASSES))
    matrix[model.source, model.target] = model.probability
    return matrix


def draw_labels(rng: np.random.Generator, count: int, model: LabelModel) -> np.ndarray:
    """`count` label sets, bool [count, K]."""
    # The round in which a label came in decides who stays when there are too many.
    arrival = _first_labels(rng, count, model)
    live = rng.random((count, len(model.source))) < model.probability
    for step in range(1, NUM_LAYERS):
        present = np.isfinite(arrival)
        reached = np.zeros_like(present)
        for edge, (i, j) in enumerate(zip(model.source, model.target, strict=True)):
            reached[:, j] |= present[:, i] & live[:, edge]
        arrival[reached & ~present] = step
    arrival += rng.random(arrival.shape) * 0.5
    rank = arrival.argsort(axis=1).argsort(axis=1)
    return np.isfinite(arrival) & (rank < MAX_LABELS)


def _draw_edges(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random edges from one layer of the shuffled classes to the next, at most two out of and two into a class.

    Layers and degree limits keep what a first label brings in small, so that `MAX_LABELS` rarely cuts anything.
    """
    layers = np.array_split(rng.permutation(NUM_CLASSES), NUM_LAYERS)
    edges: list[tuple[int, int]] = []
    outgoing, incoming = np.zeros(NUM_CLASSES, int), np.zeros(NUM_CLASSES, int)
    while len(edges) < NUM_EDGES:
        layer = len(edges) % (NUM_LAYERS - 1)
        i, j = int(rng.choice(layers[layer])), int(rng.choice(layers[layer + 1]))
        if (i, j) in edges or outgoing[i] == 2 or incoming[j] == 2:
            continue
        edges.append((i, j))
        outgoing[i] += 1
        incoming[j] += 1
    source, target = np.array(edges).T
    return source, target, rng.uniform(*EDGE_PROBABILITY, NUM_EDGES)


def _first_labels(rng: np.random.Generator, count: int, model: LabelModel) -> np.ndarray:
    """[count, K]: 0 where a label is one of the first, infinity elsewhere."""
    scene = rng.integers(0, NUM_SCENES, count)
    wanted = np.searchsorted(np.cumsum(FIRST_LABELS), rng.random(count))
    # Gumbel keys: the largest n of log p + noise are n draws without replacement.
    keys = np.log(model.profiles[scene]) - np.log(-np.log(rng.random((count, NUM_CLASSES))))
    rank = (-keys).argsort(axis=1).argsort(axis=1)
    return np.where(rank < wanted[:, None], 0.0, np.inf)
