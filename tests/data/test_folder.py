import json

import pytest

from mlfast.data import AnnotationError, load_annotations


def test_a_folder_per_class(write, labels_of):
    root = write(
        {
            "train/cat/1.jpg": b"same",
            "train/dog/1.jpg": b"same",  # one image, two labels
            "train/cat/2.jpg": b"this",
            "train/dog/2.jpg": b"that",  # two images with one name
            "train/dog/sub folder/ä.JPEG": b"x",
            "train/dog/readme.txt": b"x",
            "train/.hidden/3.jpg": b"x",
            "train/list.txt": b"x",
            "val/cat/9.png": b"x",
        }
    )
    a = load_annotations("folder", root, "train")
    assert a.classes == ("cat", "dog")
    assert labels_of(a) == {
        "train/cat/1.jpg": {"cat", "dog"},
        "train/cat/2.jpg": {"cat"},
        "train/dog/2.jpg": {"dog"},
        "train/dog/sub folder/ä.JPEG": {"dog"},
    }
    assert load_annotations("folder", root, "val", classes=a.classes).targets(0).tolist() == [1, 0]


def test_a_new_image_is_seen_in_spite_of_the_cache(write, make_old):
    root = write({"train/cat/sub/1.jpg": b"1"})
    make_old(root)
    assert len(load_annotations("folder", root, "train")) == 1
    write({"train/cat/sub/2.jpg": b"2"})
    assert len(load_annotations("folder", root, "train")) == 2


def test_a_changed_copy_is_seen_in_spite_of_the_cache(write, labels_of):
    files = {"train/cat/1.jpg": b"same", "train/dog/1.jpg": b"same", "train/dog/2.jpg": b"alone"}
    assert len(load_annotations("folder", write(files), "train")) == 2
    for content in (b"mesa", b"longer"):
        root = write({"train/dog/1.jpg": content})
        assert len(load_annotations("folder", root, "train")) == 3
    assert len(load_annotations("folder", write({"train/dog/1.jpg": b"same"}), "train")) == 2


def test_links_in_a_circle_end(write):
    root = write({"train/cat/1.jpg": b"1"})
    (root / "train/cat/again").symlink_to(root / "train")
    (root / "train/dog").symlink_to(root / "train/cat")  # a class may lie elsewhere
    assert list(load_annotations("folder", root, "train").paths) == ["train/cat/1.jpg"]


def test_hugging_face_imagefolder(write, labels_of):
    rows = [{"file_name": "a.png", "labels": ["x", "y"]}, {"file_name": "sub/b.png", "labels": [], "extra": 1}]
    root = write({"train/metadata.jsonl": "\n".join(map(json.dumps, rows)) + "\n"})
    assert labels_of(load_annotations("folder", root, "train")) == {"train/a.png": {"x", "y"}, "train/sub/b.png": set()}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{}", "metadata.jsonl, line 2: got '{}', expected"),
        ("{", "metadata.jsonl, line 2: not JSON"),
        ('{"file_name": "../../a.png", "labels": []}', r"line 2: the image path .* is refused"),
        ('{"file_name": "b.png", "labels": [1.5]}', "line 2: got the label 1.5"),
    ],
)
def test_errors(write, line, message):
    root = write({"train/metadata.jsonl": '{"file_name": "a.png", "labels": ["x"]}\n' + line})
    with pytest.raises(AnnotationError, match=message):
        load_annotations("folder", root, "train")


def test_nothing_there(write):
    with pytest.raises(AnnotationError, match="holds no image"):
        load_annotations("folder", write({"train/a.txt": ""}), "train")
    with pytest.raises(AnnotationError, match="val does not exist"):
        load_annotations("folder", write({}), "val")


def test_a_table_of_metadata_is_not_passed_over(write, labels_of):
    root = write({"train/metadata.csv": "file_name,labels\nimages/1.png,a|b\n", "train/images/1.png": "x"})
    with pytest.raises(AnnotationError, match=r"metadata.csv .* kind csv .* file=train/metadata.csv and image_f"):
        load_annotations("folder", root, "train")
    options = {"file": "train/metadata.csv", "image_folder": "train"}
    assert labels_of(load_annotations("csv", root, "train", **options)) == {"train/images/1.png": {"a", "b"}}
