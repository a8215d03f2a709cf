from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlfast.data import load_annotations
from mlfast.data.annotations import Annotations, LabelLists, PathList, _pair_counts, concatenate


def from_dense(dense, rest="negative", split="train", names=None):
    """Annotations whose targets are this array [N, K] of 1, 0, -1."""
    dense = np.asarray(dense, np.int8)
    images, classes = dense.shape
    lists = {value: LabelLists.from_pairs(*np.nonzero(dense == value), images, classes) for value in (1, 0, -1)}
    return Annotations(
        kind="test",
        split=split,
        root=Path("/nowhere"),
        classes=tuple(f"c{k}" for k in range(classes)),
        paths=PathList.of(names or [f"{split}/ä {n}.jpg" for n in range(images)]),
        positive=lists[1],
        rest=rest,
        negative=lists[0] if rest == "unknown" else None,
        unknown=lists[-1] if rest == "negative" else None,
    )


dense_arrays = st.integers(0, 2**32 - 1).map(
    lambda seed: np.random.default_rng(seed).choice(
        [-1, 0, 1], size=np.random.default_rng(seed).integers((1, 1), (9, 6)), p=[0.2, 0.5, 0.3]
    )
)


@settings(max_examples=40, deadline=None)
@given(dense_arrays, st.sampled_from(["negative", "unknown"]))
def test_everything_agrees_with_the_dense_array(dense, rest):
    a = from_dense(dense, rest)
    everything = np.arange(len(dense))
    np.testing.assert_array_equal(a.targets(everything), dense)
    np.testing.assert_array_equal(a.targets(-1), dense[-1])
    np.testing.assert_array_equal(a.counts(), (dense == 1).sum(0))
    np.testing.assert_array_equal(a.known_counts(), (dense >= 0).sum(0))
    np.testing.assert_array_equal(a.labels_per_image(), (dense == 1).sum(1))
    together, known = a.cooccurrence()
    np.testing.assert_array_equal(together, (dense == 1).T.astype(int) @ (dense == 1))
    np.testing.assert_array_equal(known, (dense == 1).T.astype(int) @ (dense >= 0))
    chosen = everything[::-2]
    part = a.subset(chosen)
    np.testing.assert_array_equal(part.targets(np.arange(len(part))), dense[chosen])
    assert list(part.paths) == [a.paths[i] for i in chosen]


def test_cooccurrence_in_several_pieces(monkeypatch):
    dense = np.random.default_rng(0).integers(0, 2, (50, 7))
    lists = from_dense(dense).positive
    monkeypatch.setattr("mlfast.data.annotations._PAIRS_AT_ONCE", 5)
    np.testing.assert_array_equal(_pair_counts(lists, lists, 7), dense.T @ dense)


def test_statistics_are_those_of_table_1():
    s = from_dense([[1, 1, 0, 0], [1, 0, 0, -1], [1, 0, 0, 0], [0, 0, 0, 0]]).statistics()
    assert (s.images, s.num_classes, s.labels_per_image, s.unlabelled) == (4, 4, 1.0, 1)
    assert s.positives.tolist() == [3, 1, 0, 0]
    np.testing.assert_allclose(s.frequency, [0.75, 0.25, 0, 0])
    assert s.empty_classes == ("c2", "c3")
    assert s.unknown_share == pytest.approx(1 / 16)
    assert s.negatives_per_positive == pytest.approx(11 / 4)
    assert s.mean_imbalance == pytest.approx((1 + 3) / 2)


def test_nothing_is_dense_or_an_object_per_image():
    # 1.8 million images of 9605 classes would be 17 GB as a dense array.
    n, k = 200_000, 9605
    lists = LabelLists(np.arange(n + 1), np.zeros(n, np.int32))
    paths = PathList(np.frombuffer(b"a.jpg" * n, np.uint8), np.arange(n + 1) * 5)
    a = Annotations("test", "train", Path("/"), tuple(map(str, range(k))), paths, lists)
    assert a.targets([0, n - 1]).shape == (2, k)
    assert a.paths[n - 1] == "a.jpg"


def test_path_list():
    names = ["a/b c.jpg", "ü.png", "x" * 300, "\udcff.jpg"]  # the last is not UTF-8 on disk
    paths = PathList.of(names)
    assert list(paths) == names and paths[-1] == names[-1] and list(paths[1:3]) == names[1:3]
    assert list(paths.select(np.array([2, 0, 0]))) == [names[2], names[0], names[0]]
    assert list(PathList.of([])) == []
    with pytest.raises(IndexError):
        paths[4]


def test_rest_and_lists_must_agree():
    a = from_dense([[1, 0]])
    with pytest.raises(ValueError, match="rest is 'negative'"):
        Annotations("t", "s", a.root, a.classes, a.paths, a.positive, negative=a.positive)
    with pytest.raises(ValueError, match="labels of 1 images and 2 paths"):
        Annotations("t", "s", a.root, a.classes, PathList.of("ab"), a.positive)


def test_concatenate():
    first, second = from_dense([[1, 0], [0, -1]]), from_dense([[0, 1]], split="test")
    both = concatenate([first, second])
    assert both.split == "train+test" and len(both) == 3
    np.testing.assert_array_equal(both.targets([0, 1, 2]), [[1, 0], [0, -1], [0, 1]])
    with pytest.raises(ValueError, match="share 2 images"):
        concatenate([first, first])
    with pytest.raises(ValueError, match="cannot be joined"):
        concatenate([first, from_dense([[1, 0, 0]], split="x")])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"delimiter": 3}, "^delimiter: got 3, expected text or nothing"),
        ({"image_suffix": None}, "^image_suffix: got None, expected text"),
        ({"classes": "abc"}, "^classes: got 'abc', expected a list or nothing"),
        ({"unlabelled": "bin"}, "^unlabelled: got 'bin', expected one of keep, drop"),
    ],
)
def test_values_of_another_type_are_named_before_a_file_is_read(tmp_path, option, message):
    with pytest.raises(ValueError, match=message):
        load_annotations("csv", tmp_path, "train", **option)
