"""A vector for each label: of word vectors, of any array, or of co-occurrence alone."""

from __future__ import annotations

import gzip
import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlfast.models.label_graph import LabelCounts, as_counts


def as_label_vectors(vectors: Any, num_classes: int) -> Tensor:
    """Any array [K, N] as a float32 tensor.

    Raises:
        TypeError: a path.
        ValueError: another number of labels, not two dimensions, or values that are not finite.
    """
    if isinstance(vectors, (str, Path)):
        raise TypeError(
            f"label_vectors must be an array [{num_classes}, N], got the path {str(vectors)!r}; read it first, word "
            "vectors by mlfast.models.read_word_vectors(path, names), an array by numpy.load(path)"
        )
    vectors = torch.as_tensor(vectors).detach().float()
    if vectors.dim() != 2 or len(vectors) != num_classes or vectors.shape[1] < 1:
        raise ValueError(
            f"label vectors must be [{num_classes}, N], one for each label, in the order of the classes; got "
            f"{list(vectors.shape)}"
        )
    if not bool(vectors.isfinite().all()):
        raise ValueError("label vectors must be finite, got NaN or infinity")
    return vectors


def read_word_vectors(path: str | Path, names: Sequence[str]) -> Tensor:
    """Label vectors [K, N] from a text file of word vectors, such as GloVe's ``glove.6B.300d.txt``.

    A line is a word and N numbers, apart by spaces or tabs. The file is read line by line up to the last word that is
    wanted. Names are looked up in lower case; a name of several words, apart by spaces or underscores, gets their mean.

    Args:
        path: the file, UTF-8, or compressed by gzip if it ends on .gz. A first line of two numbers, as word2vec writes
            it, is passed over.
        names: of the K labels, one at least.

    Warns:
        UserWarning: words of names that are not in the file; the mean is of the others.

    Raises:
        ValueError: names without any word in the file, lines of different lengths, numbers that are not finite, or a
            binary file.
    """
    if not names:
        raise ValueError("read_word_vectors: names must be those of the labels, got none")
    words = [re.split(r"[\s_]+", name.strip().lower()) for name in names]
    found = _find_words(Path(path), {word for group in words for word in group})
    missing = sorted({word for group in words for word in group} - set(found))
    nameless = [name for name, group in zip(names, words, strict=True) if not any(word in found for word in group)]
    if nameless:
        raise ValueError(
            f"{path} has no word of these labels: {', '.join(map(repr, nameless))}; rename them, or pass an array"
        )
    if missing:
        warnings.warn(f"words of labels that are not in {path}: {', '.join(missing)}", stacklevel=2)
    return torch.stack([torch.stack([found[word] for word in group if word in found]).mean(0) for group in words])


def _find_words(path: Path, wanted: set[str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if "\0" in line:
                raise ValueError(f"{path}, line {number}: binary data; write the vectors as text first")
            word, _, numbers = line.partition("\t" if "\t" in line else " ")
            if word not in wanted or word in found or (number == 1 and len(line.split()) == 2):
                continue
            try:
                vector = torch.tensor([float(text) for text in numbers.split()])
            except ValueError:
                continue  # in GloVe's largest file a few words contain a space
            if any(len(vector) != len(other) for other in found.values()):
                raise ValueError(
                    f"{path}, line {number}: {word!r} has {len(vector)} numbers, others have more or fewer"
                )
            if not bool(vector.isfinite().all()):
                raise ValueError(f"{path}, line {number}: {word!r} has numbers that are not finite")
            found[word] = vector
            if len(found) == len(wanted):
                break
    return found


def cooccurrence_vectors(counts: LabelCounts | Tensor, dimension: int = 300, negatives: float = 1.0) -> Tensor:
    """Label vectors from which labels occur together, where there are no word vectors for them.

    Levy & Goldberg (NIPS 2014): ``PMI[i, j] = log(n[i, j] * n / (n[i] * n[j]))`` over pairs of labels, shifted by
    ``log(negatives)``, cut at 0, and factorised as ``U sqrt(S)`` by a singular value decomposition. A label is with
    itself on each of its images: so labels that go together get alike vectors, not only labels with alike companions,
    no two labels get the same, and one that was never seen with another has a direction of its own. A label without any
    image gets zeros. Each column's entry of largest magnitude is positive, so that equal counts give equal vectors.

    Args:
        counts: of the training images: what `count_labels` gives, or [K, K], as for `create_label_graph`.
        dimension: the most columns; there are never more than labels.
        negatives: k of the shift, at least 1; 1 is no shift.

    Returns:
        [K, min(dimension, K)] float32.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    if dimension < 1 or not negatives >= 1:
        raise ValueError(f"dimension and negatives must be at least 1, got {dimension=} and {negatives=}")
    pairs = as_counts(counts).together.double()
    degree = pairs.sum(1)
    chance = degree[:, None] * degree / degree.sum().clamp(min=1)
    ratio = torch.where(chance > 0, pairs / chance.clamp(min=1e-300), 0)
    pmi = (ratio.clamp(min=1).log() - math.log(negatives)).clamp(min=0)
    left, singular, _ = torch.linalg.svd(pmi)
    vectors = (left * singular.sqrt())[:, :dimension]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return (vectors * torch.where(largest < 0, -1.0, 1.0)).float()
