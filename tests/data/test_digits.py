import builtins
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
from sklearn.datasets import load_digits

from mlfast.data import DigitScenes, planted_graph
from mlfast.data import digits as module
from mlfast.data.digit_labels import MAX_LABELS, draw_labels, label_model


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


def same(a, b):
    return torch.equal(a.images, b.images) and torch.equal(a.targets, b.targets)


def test_shapes_dtypes_and_names():
    data = DigitScenes(size=10)
    assert (data.images.dtype, data.images.shape) == (torch.uint8, (10, 3, 64, 64))
    assert (data.targets.dtype, data.targets.shape) == (torch.int8, (10, 40))
    assert len(data.classes) == len(set(data.classes)) == 40
    assert data.classes[0] == "red 0"
    assert data.classes[13] == "green 3"
    assert data.classes[39] == "yellow 9"
    image, target = data[3]
    assert torch.equal(image, data.images[3])
    assert torch.equal(target, data.targets[3])
    assert len(data) == len(list(data)) == 10
    assert set(data.targets.unique().tolist()) == {0, 1}


def test_works_in_a_data_loader():
    images, targets = next(iter(torch.utils.data.DataLoader(DigitScenes(size=8), batch_size=8)))
    assert (images.shape, targets.shape) == ((8, 3, 64, 64), (8, 40))


@pytest.mark.parametrize("split", ["train", "val"])
def test_same_bytes_whatever_the_workers(tmp_path, split):
    one, three = (DigitScenes(split, size=150, cache_dir=tmp_path / str(n), num_workers=n) for n in (1, 3))
    assert same(one, three)


def test_smaller_size_is_a_prefix(tmp_path):
    small, large = (DigitScenes(size=n, cache_dir=tmp_path) for n in (70, 200))
    assert torch.equal(small.images, large.images[:70])
    assert torch.equal(small.targets, large.targets[:70])


def test_seeds_and_splits_differ_and_image_size_keeps_the_scene(tmp_path):
    base = DigitScenes(size=64, cache_dir=tmp_path)
    for other in (DigitScenes(size=64, seed=1, cache_dir=tmp_path), DigitScenes("val", 64, cache_dir=tmp_path)):
        assert not torch.equal(base.targets, other.targets)
    large = DigitScenes(size=64, image_size=96, cache_dir=tmp_path)
    assert torch.equal(base.targets, large.targets)
    shrunk = torch.nn.functional.interpolate(large.images.float(), 64, mode="area")
    assert (shrunk - base.images).abs().mean() < 8


def test_positive_rate():
    per_image = draw_labels(np.random.default_rng(0), 20_000, label_model(0)).sum(axis=1)
    assert 2.5 < per_image.mean() < 3.2
    assert per_image.max() == MAX_LABELS
    assert 0.01 < (per_image == 0).mean() < 0.03


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_labels_recover_the_planted_graph(seed):
    planted = planted_graph(seed)
    labels = draw_labels(np.random.default_rng(7), 20_000, label_model(seed)).astype(float)
    measured = labels.T @ labels / labels.sum(axis=0)[:, None]
    edge = planted > 0
    assert edge.sum() == 40
    assert not (edge & edge.T).any()
    difference = (measured - planted)[edge]
    # Below: the limit on labels per image. Above: what brings in the target by itself.
    assert difference.min() > -0.15
    assert difference.max() < 0.15
    assert np.corrcoef(measured[edge], planted[edge])[0, 1] > 0.75
    unrelated = ~edge & ~edge.T & ~np.eye(40, dtype=bool)
    assert measured[edge].mean() > 8 * measured[unrelated].mean()
    assert (measured[edge].min() > measured[unrelated]).mean() > 0.98


def test_images_carry_the_labels_of_the_graph():
    data = DigitScenes(size=64)
    expected = draw_labels(np.random.default_rng([0, 2, 0, 0, 0]), 64, label_model(0))
    np.testing.assert_array_equal(data.targets.numpy(), expected)


def test_planted_graph_belongs_to_the_seed():
    assert planted_graph(3).shape == (40, 40)
    np.testing.assert_array_equal(planted_graph(3), planted_graph(3))
    assert not np.array_equal(planted_graph(3), planted_graph(4))


def test_no_drawing_is_in_both_splits():
    bunch = load_digits()
    train, val = (module.digit_pools(bunch.target, split) for split in ("train", "val"))
    for digit in range(10):
        assert set(bunch.target[np.concatenate([train[digit], val[digit]])]) == {digit}
    train, val = np.concatenate(train), np.concatenate(val)
    assert len(train) + len(val) == len(set(train) | set(val)) == 1797
    assert 0.68 < len(train) / 1797 < 0.72
    # Not only different rows: different drawings.
    pixels = [{bunch.data[row].tobytes() for row in rows} for rows in (train, val)]
    assert not pixels[0] & pixels[1]


def test_generation_uses_only_the_drawings_of_its_split(monkeypatch, tmp_path):
    bunch = load_digits()
    expected = DigitScenes("val", 20, cache_dir=tmp_path / "a")
    drawings = bunch.images.copy()
    drawings[np.concatenate(module.digit_pools(bunch.target, "train"))] = 0
    monkeypatch.setattr(module, "_load_drawings", lambda: (drawings, bunch.target))
    assert same(expected, DigitScenes("val", 20, cache_dir=tmp_path / "b"))


def test_digits_are_drawn_in_their_colour():
    data = DigitScenes(size=200)
    saturated = data.images.float() / 255
    spread = saturated.max(dim=1).values - saturated.min(dim=1).values
    assert (spread > 0.45).float().mean((1, 2))[data.targets.sum(1) > 1].min() > 0.01
    # Yellow is red and green without blue; nothing else in an image is that strong in both.
    yellow = (saturated[:, :2].min(dim=1).values - saturated[:, 2] > 0.35).float().mean((1, 2))
    has = data.targets[:, 30:].any(dim=1)
    assert yellow[has].mean() > 3 * yellow[~has].mean()


def test_cache_is_read_and_keyed_by_everything(tmp_path, monkeypatch):
    first = DigitScenes(size=5, cache_dir=tmp_path)
    assert [p.suffix for p in tmp_path.iterdir()] == [".npz"]

    def refuse(*_):
        raise AssertionError("generated although it was in the cache")

    with monkeypatch.context() as patch:
        patch.setattr(module, "_generate", refuse)
        assert same(first, DigitScenes(size=5, cache_dir=tmp_path))
        for changed in ({"size": 6}, {"seed": 1}, {"image_size": 65}, {"split": "val"}):
            with pytest.raises(AssertionError, match="generated"):
                DigitScenes(**{"size": 5, "cache_dir": tmp_path, **changed})
        patch.setattr(module, "GENERATOR_VERSION", -1)
        with pytest.raises(AssertionError, match="generated"):
            DigitScenes(size=5, cache_dir=tmp_path)


def test_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    DigitScenes(size=1)
    assert list((tmp_path / "xdg" / "mlfast").glob("*.npz"))
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    DigitScenes(size=1)
    assert list((tmp_path / "home" / ".cache" / "mlfast").glob("*.npz"))


def _cut(content):
    return content[: len(content) // 2]


def _flip(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [_cut, _flip, lambda c: b"", lambda c: b"not a cache file"])
def test_damaged_cache_is_made_again(tmp_path, damage):
    first = DigitScenes(size=5, cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match=r"cannot be read.*generating again"):
        assert same(first, DigitScenes(size=5, cache_dir=tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(first, DigitScenes(size=5, cache_dir=tmp_path))


def test_cache_with_other_arrays_is_made_again(tmp_path):
    first = DigitScenes(size=5, cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    np.savez(path, images=first.images[:3].numpy(), targets=first.targets.numpy())
    with pytest.warns(UserWarning, match="other arrays"):
        assert same(first, DigitScenes(size=5, cache_dir=tmp_path))


def test_unwritable_cache_only_warns(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="Could not keep"):
        assert len(DigitScenes(size=3, cache_dir=blocked / "mlfast")) == 3


def test_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def full_disk(*_args, **_kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.warns(UserWarning, match="No space left"):
        DigitScenes(size=3, cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, r"split: got 'test', expected \"train\" or \"val\""),
        ({"size": 0}, "size: got 0, expected an integer >= 1"),
        ({"size": 2.5}, "size: got 2.5"),
        ({"size": True}, "size: got True"),
        ({"image_size": 16}, "image_size: got 16, expected an integer from 32 to 512"),
        ({"image_size": "64"}, "image_size: got '64'"),
        ({"seed": -1}, "seed: got -1, expected an integer >= 0"),
        ({"num_workers": 0}, "num_workers: got 0, expected an integer >= 1"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        DigitScenes(**arguments)


def test_missing_scikit_learn_names_the_command(monkeypatch):
    real = builtins.__import__

    def without_sklearn(name, *rest):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_sklearn)
    with pytest.raises(ImportError, match=r'pip install "\.\[train\]" in a checkout of mlfast'):
        DigitScenes(size=2)


def test_import_is_light():
    code = (
        "import sys, mlfast.data, mlfast.evaluation\n"
        "print([m for m in ('sklearn', 'PIL', 'torchvision', 'scipy', 'torchmetrics') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert result.stdout.strip() == "[]"
