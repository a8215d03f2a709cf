import json

import pytest

from mlfast.data import AnnotationError, json_file, load_annotations


def test_as_the_released_code_writes_it(write, labels_of):
    images = [["images/b ä.jpg", ["dog", "cat", "dog"]], ["images\\a.jpg", []]]
    root = write({"train.json": json.dumps({"classes": ["dog", "cat", "cow"], "images": images}, ensure_ascii=False)})
    a = load_annotations("json", root, "train")
    assert a.classes == ("cat", "cow", "dog")  # sorted, as the released code numbers them
    assert labels_of(a) == {"images/b ä.jpg": {"cat", "dog"}, "images/a.jpg": set()}
    assert a.notes == ("1 times an image lists a label again; it counts once",)
    assert a.counts().tolist() == [1, 0, 1] and a.labels_per_image().tolist() == [2, 0]
    assert len(load_annotations("json", root, "train", unlabelled="drop")) == 1
    assert load_annotations("json", root, "train", classes=["dog", "cat"]).classes == ("dog", "cat")


def test_numbers_as_classes_stay_in_order(write):
    content = {"classes": list(range(12)), "images": [["a.jpg", [10, 2]]]}
    a = load_annotations("json", write({"train.json": json.dumps(content)}), "train")
    assert a.classes == tuple(map(str, range(12))) and a.positive[0].tolist() == [2, 10]


def test_labels_known_to_be_absent(write):
    content = {
        "classes": ["a", "b", "c"],
        "images": [["1.jpg", ["a"], ["c"]], ["2.jpg", ["b"]], ["3.jpg", ["c"], ["c"]]],
    }
    a = load_annotations("json", write({"train.json": json.dumps(content)}), "train")
    assert a.targets([0, 1, 2]).tolist() == [[1, -1, 0], [-1, 1, -1], [-1, -1, 1]]
    assert a.notes == ("1 labels were contradictory; positive went before negative before unknown",)


def test_file_in_a_folder_has_paths_relative_to_it(write):
    root = write({"coco/val.json": json.dumps({"classes": ["a"], "images": [["x.jpg", ["a"]]]})})
    assert list(load_annotations("json", root, "val", file="coco/val.json").paths) == ["coco/x.jpg"]
    with pytest.raises(AnnotationError, match="refused"):
        load_annotations("json", root, "val", file="../val.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "expected an object"),
        ({"classes": ["a"]}, "expected an object"),
        ({"classes": ["a", "a"], "images": [["x", ["a"]]]}, "'a' stands there more than once"),
        ({"classes": ["a", 1], "images": []}, "train.json: "),
        ({"classes": ["a"], "images": []}, "holds no image"),
        ({"classes": [], "images": [["x.jpg", []]]}, "holds no label"),
        ({"classes": ["a"], "images": [["x.jpg", ["a"]], ["y.jpg"]]}, r"images\[1\]: got \['y.jpg'\], expected"),
        ({"classes": ["a"], "images": [["x.jpg", "a"]]}, r"images\[0\]: got .* expected \[path, \[labels\]\]"),
        ({"classes": ["a"], "images": [["x.jpg", ["b"]]]}, r"images\[0\]: the label 'b' is not one of the 1 classes"),
        ({"classes": ["a"], "images": [["x.jpg", [None]]]}, "got the label None, expected text"),
        ({"classes": ["a"], "images": [["../x.jpg", ["a"]]]}, r"images\[0\]: the image path '../x.jpg' is refused"),
    ],
)
def test_errors(write, content, message):
    with pytest.raises(AnnotationError, match=message):
        load_annotations("json", write({"train.json": json.dumps(content)}), "train")


def test_unknown_labels_are_counted(write):
    content = {"classes": ["a"], "images": [["x.jpg", ["b", "a"]], ["y.jpg", ["b", "c"]]]}
    a = load_annotations("json", write({"t.json": json.dumps(content)}), "t", unknown_labels="ignore")
    assert a.counts().tolist() == [1] and a.notes == ("3 labels that are not classes were left out: 'b', 'c'",)
    with pytest.raises(ValueError, match="unknown_labels: got 'drop'"):
        load_annotations("json", a.root, "t", unknown_labels="drop")


def test_labels_that_are_no_text(write):
    with pytest.raises(AnnotationError, match=r"images\[0\]: got the label \['a'\], expected text"):
        load_annotations("json", write({"train.json": '{"classes": ["a"], "images": [["1.png", [["a"]]]]}'}), "train")


def test_a_list_is_written_whole_or_not(write, tmp_path):
    a = load_annotations(
        "json", write({"train.json": '{"classes": ["a"], "images": [["\\udcff.png", ["a"]]]}'}), "train"
    )
    with pytest.raises(AnnotationError, match="is not UTF-8 and cannot be listed"):
        json_file.write(a, tmp_path / "part.json")
    assert not list(tmp_path.glob("part*"))
    (tmp_path / "part.json").write_text("mine")
    good = load_annotations("json", write({"train.json": '{"classes": ["a"], "images": [["ü.png", ["a"]]]}'}), "train")
    with pytest.raises(FileExistsError):
        json_file.write(good, tmp_path / "part.json")
    assert (tmp_path / "part.json").read_text() == "mine"
