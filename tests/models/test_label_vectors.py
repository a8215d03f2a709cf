import gzip

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity

from mlfast.models import cooccurrence_vectors, count_labels, read_word_vectors
from mlfast.models.label_vectors import as_label_vectors

GLOVE = """\
the 9 9 9
dog 1 0 0
dining 0 2 0
at name@x.org 1 2
table 0 4 2
cat 0 0 1
"""


@pytest.fixture
def glove(tmp_path):
    path = tmp_path / "glove.txt"
    path.write_text(GLOVE)
    return path


def test_names_of_several_words_are_means(glove):
    vectors = read_word_vectors(glove, ["Dog", "dining_table", "dining  table", "cat"])
    assert vectors.tolist() == [[1, 0, 0], [0, 3, 1], [0, 3, 1], [0, 0, 1]]
    assert vectors.dtype == torch.float32


def test_missing_words_are_named(glove):
    with pytest.warns(UserWarning, match=r"words of labels that are not in .*glove.txt: house, zebra"):
        vectors = read_word_vectors(glove, ["dog house", "zebra cat"])
    assert vectors.tolist() == [[1, 0, 0], [0, 0, 1]]
    with pytest.raises(ValueError, match=r"has no word of these labels: 'fox', 'Red Fox'; rename them, or pass an arr"):
        read_word_vectors(glove, ["dog", "fox", "Red Fox"])


def test_reading_stops_at_the_last_word_that_is_wanted(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("dog 1 2\n" + "dog broken\n" + "cat 3\n")
    assert read_word_vectors(path, ["dog"]).tolist() == [[1, 2]]
    with pytest.raises(ValueError, match=r"long.txt, line 3: 'cat' has 1 numbers, others have more or fewer"):
        read_word_vectors(path, ["dog", "cat"])


def test_odd_lines_are_passed_over(tmp_path):
    path = tmp_path / "odd.txt"
    path.write_text("2 3\nat name@x.org 1 2 3\nat 4 5 6\n2 7 8 9\n")
    assert read_word_vectors(path, ["at", "2"]).tolist() == [[4, 5, 6], [7, 8, 9]]


def test_tabs_a_byte_order_mark_and_gzip(tmp_path):
    text = "\ufeffdog\t1\t2\ncat\t3\t4\n"
    (tmp_path / "v.txt").write_text(text, encoding="utf-8")
    (tmp_path / "v.txt.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("v.txt", "v.txt.gz"):
        assert read_word_vectors(tmp_path / name, ["dog", "cat"]).tolist() == [[1, 2], [3, 4]]


def test_what_is_no_text_of_vectors(tmp_path):
    path = tmp_path / "v.bin"
    path.write_bytes(b"1 2\ndog \0\0\x80?")
    with pytest.raises(ValueError, match=r"v.bin, line 2: binary data; write the vectors as text"):
        read_word_vectors(path, ["dog"])
    path.write_text("dog 1 nan\n")
    with pytest.raises(ValueError, match=r"line 1: 'dog' has numbers that are not finite"):
        read_word_vectors(path, ["dog"])
    with pytest.raises(ValueError, match="names must be those of the labels, got none"):
        read_word_vectors(path, [])


def test_any_array():
    with pytest.raises(TypeError, match=r"got the path 'glove.txt'; read it first"):
        as_label_vectors("glove.txt", 3)
    assert as_label_vectors(np.ones((3, 2)), 3).dtype == torch.float32
    assert as_label_vectors([[1, 2], [3, 4]], 2).tolist() == [[1, 2], [3, 4]]
    for wrong in (np.ones((2, 2)), np.ones(3), np.ones((3, 0))):
        with pytest.raises(ValueError, match=r"label vectors must be \[3, N\], one for each label"):
            as_label_vectors(wrong, 3)
    with pytest.raises(ValueError, match="must be finite"):
        as_label_vectors([[1.0, float("nan")]], 1)


def grouped_counts():
    """Labels 0, 1, 2 go together, and so do 3, 4, 5; label 6 is alone."""
    torch.manual_seed(0)
    targets = torch.zeros(400, 7, dtype=torch.uint8)
    targets[:200, :3] = torch.rand(200, 3) < 0.6
    targets[200:390, 3:6] = torch.rand(190, 3) < 0.6
    targets[390:, 6] = 1
    return count_labels(targets)


def test_labels_of_one_group_get_alike_vectors():
    vectors = cooccurrence_vectors(grouped_counts())
    assert vectors.shape == (7, 7) and vectors.dtype == torch.float32
    cosines = cosine_similarity(vectors[:, None], vectors, dim=2)
    same, other = cosines[:3, :3], cosines[:3, 3:]
    assert same.min() > 0.4 and other.abs().max() < 1e-5
    assert vectors[6].norm() > 1 and cosines[6, :6].abs().max() < 1e-5  # a direction of its own


def test_labels_that_go_together_are_alike_and_yet_not_the_same():
    """Without its pair with itself, 0 and 1 would be orthogonal, and 2 and 3, with equal companions, the same."""
    together = torch.tensor([[9, 8, 0, 0, 0], [8, 9, 0, 0, 0], [0, 0, 5, 0, 4], [0, 0, 0, 5, 4], [0, 0, 4, 4, 9]])
    cosines = cosine_similarity(*(cooccurrence_vectors(together)[None].transpose(0, i) for i in (0, 1)), dim=2)
    assert cosines[0, 1] > 0.8 and cosines[2, 4] > 0.5 and cosines[2, 3] < 0.9


def test_they_factorise_the_pmi_and_have_one_sign():
    counts = grouped_counts()
    vectors = cooccurrence_vectors(counts).double()
    pairs = counts.together.double()
    degree = pairs.sum(1)
    pmi = (pairs * pairs.sum() / (degree[:, None] * degree)).clamp(min=1).log()
    left, singular, _ = torch.linalg.svd(pmi)
    torch.testing.assert_close(vectors @ vectors.t(), left * singular @ left.t(), atol=1e-5, rtol=1e-5)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    assert (largest >= 0).all()
    assert torch.equal(cooccurrence_vectors(counts), cooccurrence_vectors(counts))
    assert torch.equal(cooccurrence_vectors(counts, dimension=2), vectors[:, :2].float())


def test_a_label_without_images_gets_zeros():
    vectors = cooccurrence_vectors(torch.tensor([[5, 2, 0], [2, 4, 0], [0, 0, 0]]))
    assert vectors.isfinite().all() and vectors[2].tolist() == [0, 0, 0] and vectors[:2].norm(dim=1).min() > 0


def test_the_shift_lowers_every_pmi():
    counts = grouped_counts()
    assert cooccurrence_vectors(counts, negatives=1e9).abs().max() == 0
    assert cooccurrence_vectors(counts, negatives=1.2).norm() < cooccurrence_vectors(counts).norm()
    with pytest.raises(ValueError, match="must be at least 1, got dimension=0"):
        cooccurrence_vectors(counts, dimension=0)
