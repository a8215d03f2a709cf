"""`mlfast data split`."""

import json

import numpy as np
import pytest

from mlfast import cli
from mlfast.data import load_annotations
from tests.data.test_stratify import long_tail
from tests.data.test_webdataset import labels, tar


def split(*arguments):
    return cli.main(["data", "split", *map(str, arguments)])


def test_a_file_without_a_split_column_becomes_two_lists(write, capsys):
    dense = long_tail(400, 6)
    rows = [f"ä {n}.jpg,{'|'.join(f'c{k}' for k in np.flatnonzero(row))}" for n, row in enumerate(dense)]
    root = write({"mine.csv": "\n".join(["image,labels", *rows])})
    arguments = ["csv", root, "--split", "all", "--file", "mine.csv"]
    assert split(*arguments, "--into", "train=0.75", "val=0.25") == 0
    out = capsys.readouterr().out
    train, val = (load_annotations("json", root, name) for name in ("train", "val"))
    assert f"{root / 'train.json'}: {len(train)} images" in out and f"check json {root} --split train val" in out
    assert sorted([*train.paths, *val.paths]) == sorted(row.split(",")[0] for row in rows)
    assert abs(len(val) - 100) <= 3 and np.abs(val.counts() - dense.sum(0) / 4).max() <= 2
    whole = load_annotations("csv", root, "all", file="mine.csv")
    targets = {path: whole.targets(row).tolist() for row, path in enumerate(whole.paths)}
    assert train.classes == val.classes == whole.classes
    assert all(targets[path] == train.targets(row).tolist() for row, path in enumerate(train.paths))
    assert split(*arguments) == 2
    assert f"{root / 'train.json'} exists already and is not written over" in capsys.readouterr().err


def test_unknown_labels_stay_unknown(write):
    root = write({"t.csv": "image,x,y,z\n1.jpg,1,0,\n2.jpg,0,-1,0\n3.jpg,1,1,1\n"})
    assert split("csv", root, "--split", "t", "--into", "all=1") == 0
    assert load_annotations("json", root, "all").targets([0, 1, 2]).tolist() == [[1, 0, -1], [0, -1, 0], [1, 1, 1]]


@pytest.mark.parametrize(
    ("into", "message"),
    [
        (["a=x", "b=1"], "got 'a=x', expected NAME=SHARE"),
        (["a"], "got 'a', expected NAME=SHARE"),
        (["../a=1"], "expected one without a slash"),
        (["a=0.5", "a=0.5"], "expected every name once"),
        (["a=0.5", "b=0.6"], r"fractions: got [0.5, 0.6], expected numbers above 0 with the sum 1"),
    ],
)
def test_wrong_parts(write, capsys, into, message):
    root = write({"t.json": json.dumps({"classes": ["x"], "images": [["1.jpg", ["x"]]]})})
    assert split("json", root, "--split", "t", "--into", *into) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in root.iterdir()] == ["t.json"]


def test_shards_are_refused(write, jpeg, capsys):
    root = write({"t-0.tar": tar(("1.jpg", jpeg()), ("1.json", labels("a")))})
    assert split("webdataset", root, "--split", "t") == 2
    assert "webdataset lies in shards" in capsys.readouterr().err


def test_commands_are_listed(capsys):
    assert cli.main(["data", "--help"]) == 0
    assert "mlfast data split KIND ROOT" in capsys.readouterr().out
    for argv, got in (([], "nothing"), (["chekc"], "chekc")):
        assert cli.main(["data", *argv]) == 2
        assert f"got {got}, expected check or split" in capsys.readouterr().err
