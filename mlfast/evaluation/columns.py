"""Scores of one class at a time: what average precision and thresholds both need, exact under ties."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
import torch

Result = TypeVar("Result")

# A block of columns is transposed in tiles of rows: both ends of the copy stay in the caches and the page tables. For
# 125,000 x 9,600 scores that is the difference between 2 seconds and more than 10.
BLOCK_COLUMNS = 128
TILE_ROWS = 512


class Column(NamedTuple):
    """The known entries of one class."""

    label: int
    scores: np.ndarray
    positive: np.ndarray  # whether they are


Blocks = Iterator[Callable[[], list[Column]]]


class Ranks(NamedTuple):
    """What happens when the threshold is put at each positive of a class, from the lowest score to the highest.

    Attributes:
        scores: [P] of the positives, ascending.
        true: [P] positives with at least that score.
        predicted: [P] known entries with at least that score.
        everything: [N] scores of all known entries, ascending.
    """

    scores: np.ndarray
    true: np.ndarray
    predicted: np.ndarray
    everything: np.ndarray


def ranks(column: Column) -> Ranks:
    """Ranks of one class. Values are sorted, not indices, which is several times faster."""
    everything, positives = np.sort(column.scores), np.sort(column.scores[column.positive])
    # Places from the left, so that everything equal counts as above or level.
    true = len(positives) - np.searchsorted(positives, positives)
    predicted = len(everything) - np.searchsorted(everything, positives)
    return Ranks(positives, true, predicted, everything)


def dense_blocks(score: torch.Tensor, target: torch.Tensor) -> Blocks:
    """The columns of two [N, K] matrices on the CPU, without the entries whose target is unknown (< 0)."""
    for first in range(0, score.shape[1], BLOCK_COLUMNS):
        yield functools.partial(_dense_block, score, target, slice(first, first + BLOCK_COLUMNS))


def _dense_block(score: torch.Tensor, target: torch.Tensor, columns: slice) -> list[Column]:
    scores = score[:, columns]
    scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    block = []
    for label, (row, truth) in enumerate(zip(_transposed(scores), _transposed(target[:, columns]), strict=True)):
        known = truth >= 0
        row, truth = (row, truth) if known.all() else (row[known], truth[known])
        block.append(Column(columns.start + label, row, truth > 0))
    return block


def _transposed(matrix: torch.Tensor) -> np.ndarray:
    source = matrix.numpy()
    result = np.empty(source.shape[::-1], source.dtype)
    for first in range(0, len(source), TILE_ROWS):
        rows = slice(first, first + TILE_ROWS)
        result[:, rows] = source[rows].T
    return result


def known_blocks(label: np.ndarray, score: np.ndarray, positive: np.ndarray, num_classes: int) -> Blocks:
    """The columns of a list of known entries, each with its class."""
    order = np.argsort(label, kind="stable")
    ends = np.concatenate([[0], np.cumsum(np.bincount(label, minlength=num_classes))])
    score, positive = score[order], positive[order]

    def block(first: int) -> list[Column]:
        labels = range(first, min(first + BLOCK_COLUMNS, num_classes))
        return [Column(k, score[ends[k] : ends[k + 1]], positive[ends[k] : ends[k + 1]]) for k in labels]

    for first in range(0, num_classes, BLOCK_COLUMNS):
        yield functools.partial(block, first)


def map_columns(function: Callable[[Column], Result], blocks: Blocks) -> list[Result]:
    """``function`` of every column, in order, on as many threads as torch has: numpy sorts outside Python's lock."""
    work = list(blocks)
    with ThreadPoolExecutor(max(1, min(torch.get_num_threads(), len(work)))) as pool:
        return list(itertools.chain(*pool.map(lambda block: [function(column) for column in block()], work)))
