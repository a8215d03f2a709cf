import json

import pytest

from mlfast import cli
from mlfast.data.digits import DEFAULT_SIZE


@pytest.fixture
def root(write, jpeg):
    classes = ["cat", "cow", "dog"]
    train = [
        ["a.jpg", ["cat", "dog"]],
        ["b ä.jpg", ["dog"]],
        ["c.jpg", []],
        ["gone.jpg", ["dog"]],
        ["zero.jpg", ["dog"]],
    ]
    files = {name: jpeg((n, 9 * n, 0)) for n, name in enumerate(("a.jpg", "b ä.jpg", "c.jpg", "stray.jpg"))}
    files |= {"zero.jpg": b"", "cut.jpg": files["a.jpg"][:150], "twin.jpg": files["c.jpg"]}
    val = [["a.jpg", ["cat"]], ["cut.jpg", ["cat"]], ["twin.jpg", ["dog"]]]
    return write(
        files
        | {
            "train.json": json.dumps({"classes": classes, "images": train}),
            "val.json": json.dumps({"classes": classes, "images": val}),
        }
    )


def test_statistics_and_problems_by_name(root, capsys):
    assert (
        cli.main(["data", "check", "json", str(root), "--decode", "--speed", "--size", "32", "--split", "train", "val"])
        == 1
    )
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    assert ["train", "5", "3", "1.000", "1", "0.0%", "2.0", "2.5"] in lines
    assert ["4", "80.00%", "dog"] in lines
    for text in (
        "note: train: 1 classes have no image: cow",
        "problem: train and val share 1 images: a.jpg",
        "problem: train: 1 of 5 files are missing: gone.jpg",
        "problem: train: 1 files are empty: zero.jpg",
        "note: 1 images in the root are in none of these splits: stray.jpg",
        "problem: val: 1 images cannot be decoded: cut.jpg (",
        "images are there more than once with the same content",
        "train:c.jpg = val:twin.jpg",
        "speed: train: ",
        "images/s on one core at 32 x 32",
    ):
        assert text in out, text


def test_a_clean_data_set(root, write, capsys):
    write({"clean.json": json.dumps({"classes": ["x"], "images": [["a.jpg", ["x"]]]})})
    assert cli.main(["data", "check", "json", str(root), "--split", "clean"]) == 0
    assert "no problems found; --decode looks into the images too" in capsys.readouterr().out


def test_options_of_the_format(write, jpeg, capsys):
    root = write(
        {"my.csv": "image,split,x,y\n1,train,1,\n2,val,0,1\n", "img/1.jpg": jpeg(), "img/2.jpg": jpeg((1, 1, 1))}
    )
    options = ["--file", "my.csv", "--image_folder", "img", "--image-suffix", ".jpg", "--class-columns=x, y"]
    assert cli.main(["data", "check", "csv", str(root), *options]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["train", "1", "2", "1.000", "0", "50.0%", "0.0", "1.0"] in lines
    assert any(line[:2] == ["val", "1"] for line in lines)


def test_all_classes(write, jpeg, capsys):
    names = [f"class {n}" for n in range(30)]
    root = write({"a.jpg": jpeg(), "t.json": json.dumps({"classes": names, "images": [["a.jpg", names]]})})
    assert cli.main(["data", "check", "json", str(root)]) == 0
    assert "... 14 more, shown by --all_classes" in capsys.readouterr().out
    assert cli.main(["data", "check", "json", str(root), "--all-classes"]) == 0
    assert capsys.readouterr().out.count("class ") >= 30


def test_splits_with_other_classes(write, jpeg, capsys):
    root = write(
        {
            "a.jpg": jpeg(),
            "b.jpg": jpeg((1, 1, 1)),
            "t.csv": "image,label\na.jpg,x\n",
            "v.csv": "image,label\nb.jpg,y\n",
        }
    )
    assert cli.main(["data", "check", "csv", str(root)]) == 1
    assert "problem: the classes of t and v differ: x, y; give both the same list" in capsys.readouterr().out
    assert cli.main(["data", "check", "csv", str(root), "--classes", "x,y"]) == 0


def test_digits(capsys, monkeypatch):
    monkeypatch.setitem(DEFAULT_SIZE, "val", 20)
    assert cli.main(["data", "check", "digits", "--split", "val"]) == 0
    assert ["val", "20", "40"] in [line.split()[:3] for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["json"], "json needs ROOT"),
        (["json", "/nowhere"], "/nowhere is not a folder"),
        (["json", "ROOT", "--split", "test"], "test.json does not exist"),
        (["coco", "ROOT", "--year", "x"], "year: got 'x', expected a number"),
        (["openimages", "ROOT", "--expand", "x"], "expand: got 'x', expected true or false"),
        (["folder", "ROOT"], "holds nothing that looks like a split of kind folder"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(root, capsys, arguments, message):
    assert cli.main(["data", "check", *[str(root) if a == "ROOT" else a for a in arguments]]) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("mlfast data: ") and "Traceback" not in err


@pytest.mark.parametrize("arguments", [["check"], ["check", "coko", "x"], ["check", "json", "x", "--yaer", "1"]])
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["data", *arguments])
    assert stopped.value.code == 2


@pytest.mark.parametrize("command", ["check", "split"])
def test_help_has_the_options_of_the_format(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["data", command, "voc2007", "--help"])
    assert stopped.value.code == 0
    assert "--difficult" in capsys.readouterr().out


def test_labels_that_look_like_a_slip(write, jpeg, capsys):
    images = {f"{n}.jpg": jpeg() for n in range(4)}
    root = write({"t.csv": "image,labels\n0.jpg,cat\n1.jpg,dog\n2.jpg,cat dog\n3.jpg,Cat\n", **images})
    assert cli.main(["data", "check", "csv", str(root)]) == 1
    out = capsys.readouterr().out
    assert "1 class names are made of others: 'cat dog'; if blanks separate labels, read them with --delimiter" in out
    assert "1 class names differ in upper and lower case alone: 'Cat' and 'cat'" in out


def test_copies_in_the_folders_of_several_classes_are_no_strays(write, jpeg, capsys):
    root = write({"train/a/1.jpg": jpeg(), "train/b/1.jpg": jpeg(), "train/b/2.jpg": jpeg((1, 2, 3))})
    assert cli.main(["data", "check", "folder", str(root), "--split", "train"]) == 0
    assert "none of these splits" not in capsys.readouterr().out
    (root / "train/b/metadata.jsonl").write_text('{"file_name": "2.jpg", "labels": ["b"]}')
    assert cli.main(["data", "check", "folder", str(root / "train"), "--split", "b"]) == 0
    assert "1 images in b are in none of these splits: 1.jpg" in capsys.readouterr().out
