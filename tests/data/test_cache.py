import functools
import json
import os
import warnings

import numpy as np
import pytest

from mlfast.data import json_file, load_annotations


@pytest.fixture
def root(write, make_old):
    content = {"classes": ["a", "b"], "images": [["ü 1.jpg", ["a"], ["b"]], ["2.jpg", ["b"]]]}
    root = write({"train.json": json.dumps(content)})
    make_old(root)
    return root


@pytest.fixture
def reads(monkeypatch):
    """Counts how often the files are really read."""
    calls = []
    real = json_file.read
    monkeypatch.setattr(json_file, "read", functools.wraps(real)(lambda *a, **k: calls.append(a) or real(*a, **k)))
    return calls


def same(a, b):
    everything = np.arange(len(a))
    return (
        list(a.paths) == list(b.paths)
        and (a.kind, a.split, a.root, a.classes, a.rest, a.notes)
        == (b.kind, b.split, b.root, b.classes, b.rest, b.notes)
        and np.array_equal(a.targets(everything), b.targets(everything))
    )


def load(root, cache, **options):
    return load_annotations("json", root, "train", cache_dir=cache, **options)


def test_read_once(root, reads, tmp_path):
    first, second = load(root, tmp_path / "c"), load(root, tmp_path / "c")
    assert len(reads) == 1 and same(first, second)
    assert second.paths[0] == "ü 1.jpg" and second.targets(0).tolist() == [1, 0]
    load(root, tmp_path / "c", unlabelled="drop")  # other options, other file
    assert len(reads) == 2


def test_a_change_of_the_file_is_seen(root, reads, write, make_old, tmp_path):
    load(root, tmp_path / "c")
    text = (root / "train.json").read_text().replace("2.jpg", "3.jpg")  # as long as before
    write({"train.json": text})
    assert load(root, tmp_path / "c").paths[1] == "3.jpg" and len(reads) == 2


def test_a_change_that_leaves_size_and_times_is_seen(root, reads, write, tmp_path):
    load(root, tmp_path / "c")
    path, before = root / "train.json", (root / "train.json").stat()
    write({"train.json": path.read_text().replace("2.jpg", "3.jpg")})
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert load(root, tmp_path / "c").paths[1] == "3.jpg" and len(reads) == 2


def test_the_same_content_at_another_time_is_not_read_again(root, reads, write, tmp_path):
    load(root, tmp_path / "c")
    write({"train.json": (root / "train.json").read_text()})
    load(root, tmp_path / "c")
    assert len(reads) == 1


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text", "pickle", "range", "offsets", "missing"])
def test_a_damaged_cache_is_made_again(root, reads, tmp_path, damage):
    first = load(root, tmp_path)
    (path,) = tmp_path.glob("json-*.npz")
    content = path.read_bytes()
    with np.load(path) as stored:
        arrays = dict(stored)
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        middle = content.index(b"jpg")
        path.write_bytes(content[:middle] + b"gif" + content[middle + 3 :])
    elif damage in ("empty", "text"):
        path.write_bytes(b"" if damage == "empty" else b"hello")
    elif damage == "pickle":
        np.savez(path, **arrays | {"meta": np.array([{}], object)})
    elif damage == "range":
        np.savez(path, **arrays | {"positive_indices": np.array([0, 7], np.int32)})
    elif damage == "offsets":
        np.savez(path, **arrays | {"offsets": arrays["offsets"][::-1].copy()})
    else:
        np.savez(path, meta=arrays["meta"])
    with pytest.warns(UserWarning, match=r"The cache file .* generating again"):
        assert same(first, load(root, tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(first, load(root, tmp_path))
    assert len(reads) == 2


def test_an_unwritable_cache_only_warns(root, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="Could not keep the annotations"):
        assert len(load(root, tmp_path / "file" / "c")) == 2


def test_unknown_kind(root):
    with pytest.raises(ValueError, match=r"kind: got 'coko', expected one of coco, csv, .*; did you mean 'coco'"):
        load_annotations("coko", root, "train")


def test_shards_survive_and_are_known_by_their_stamps(write, make_old, jpeg, tmp_path):
    from tests.data.test_webdataset import labels, tar

    def both():
        return [load_annotations("webdataset", root, "t", cache_dir=tmp_path / "c") for _ in range(2)]

    root = write({"t-0.tar": tar(("1.jpg", jpeg()), ("1.json", labels("a")))})
    both()
    assert not (tmp_path / "c").exists()  # changed just now: a second change might leave the stamp
    make_old(root)
    first, second = both()
    assert list((tmp_path / "c").iterdir())
    assert second.shards.files == first.shards.files
    np.testing.assert_array_equal(second.shards.position, first.shards.position)
    write({"t-0.tar": tar(("1.jpg", jpeg()), ("1.json", labels("b")))})
    make_old(root)  # the same size, and perhaps the same time
    assert both()[0].classes == ("b",)
