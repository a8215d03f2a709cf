import json

import numpy as np
import pytest

from mlfast.data import AnnotationError, load_annotations, openimages

HEADER = "ImageID,Source,LabelName,Confidence\n"
ROWS = """\
000002b66c9c498e,verification,/m/01g317,1
000002b66c9c498e,crowdsource-verification,/m/0cmf2,0
000002b66c9c498e,verification,/m/0zzzz,1
00000a0000000001,verification,/m/04yx4,1.0
00000a0000000001,verification,/m/04yx4,0
ffffffffffffffff,verification,/m/0cmf2,0
"""
DESCRIPTIONS = 'LabelName,DisplayName\n/m/01g317,Person\n/m/04yx4,Man\n/m/0cmf2,Airplane\n/m/0k5j,"Aircraft, any"\n'
HIERARCHY = {
    "LabelName": "/m/0bl9f",
    "Subcategory": [
        {"LabelName": "/m/01g317", "Subcategory": [{"LabelName": "/m/04yx4"}]},
        {"LabelName": "/m/0k5j", "Subcategory": [{"LabelName": "/m/0cmf2"}], "Part": [{"LabelName": "/m/0199g"}]},
    ],
}
FILE = "oidv6-train-annotations-human-imagelabels.csv"


@pytest.fixture
def root(write):
    return write(
        {
            FILE: HEADER + ROWS.replace("\n", "\r\n"),
            "annotations/class-descriptions-boxable.csv": DESCRIPTIONS,
            "annotations/bbox_labels_600_hierarchy.json": json.dumps(HIERARCHY),
        }
    )


def test_verified_labels_and_the_rest_unknown(root, labels_of):
    a = load_annotations("openimages", root, "train")
    assert a.classes == ("Person", "Man", "Airplane", "Aircraft, any")
    assert list(a.paths) == [f"train/{name}.jpg" for name in ("000002b66c9c498e", "00000a0000000001", "f" * 16)]
    assert a.targets([0, 1, 2]).tolist() == [[1, -1, 0, -1], [-1, 1, -1, -1], [-1, -1, 0, -1]]
    assert a.notes == (
        "1 rows are about other classes and were left out",
        "1 labels are both verified and denied; they count as positive",
    )


def test_hierarchy(root):
    a = load_annotations("openimages", root, "train", expand=True)
    # A man is a person. No airplane says nothing about other aircraft.
    assert a.targets([0, 1, 2]).tolist() == [[1, -1, 0, -1], [1, 1, -1, -1], [-1, -1, 0, -1]]


def test_negatives_go_down_the_hierarchy(root, write):
    write({FILE: HEADER + "0000000000000001,verification,/m/0k5j,0\n"})
    assert load_annotations("openimages", root, "train", expand=True).targets(0).tolist() == [-1, -1, 0, 0]


def test_a_part_is_no_kind(root, write):
    # The tree names what things consist of too: a wheel makes no aircraft, and where no aircraft is may be a wheel.
    rows = "0000000000000001,verification,/m/0199g,1\n0000000000000002,verification,/m/0k5j,0\n"
    write({FILE: HEADER + rows, "annotations/class-descriptions-boxable.csv": DESCRIPTIONS + "/m/0199g,Wheel\n"})
    a = load_annotations("openimages", root, "train", expand=True)
    assert a.targets([0, 1]).tolist() == [[-1, -1, -1, -1, 1], [-1, -1, 0, 0, -1]]


def test_all_classes_and_the_newer_file_first(root, write):
    write(
        {
            "oidv7-class-descriptions.csv": "/m/0zzzz,Rare\n",
            "oidv7-train-annotations-human-imagelabels.csv": HEADER + ROWS,
        }
    )
    a = load_annotations("openimages", root, "train", class_set="all")
    assert a.classes == ("Rare",) and len(a) == 1


def test_chunks_make_no_difference(root, monkeypatch):
    whole = load_annotations("openimages", root, "train")
    for size in (1, 50, 97):
        monkeypatch.setattr(openimages, "_CHUNK_BYTES", size)
        pieces = load_annotations("openimages", root, "train")
        assert list(pieces.paths) == list(whole.paths)
        np.testing.assert_array_equal(pieces.targets([0, 1, 2]), whole.targets([0, 1, 2]))


@pytest.mark.parametrize(
    "line",
    [
        "000002b66c9c498g,verification,/m/01g317,1",
        "000002B66C9C498E,verification,/m/01g317,1",
        "000002b66c9c498,verification,/m/01g317,1",
        "000002b66c9c498e,verification,/m/01g317,0.7",
        "000002b66c9c498e,verification,/m/01g317,2",
        "000002b66c9c498e,verification,/m/01g317,",
        "000002b66c9c498e,verification,/m/01g317",
        "000002b66c9c498e,verification,,1",
        "000002b66c9c498e,verification,/m/" + "1" * 30 + ",1",
        "000002b66c9c498e,a,b,/m/01g317,1",
        "../../etc/passwd,verification,/m/01g317,1",
        "",
    ],
)
@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_a_wrong_line_is_named(root, write, monkeypatch, line, chunk):
    monkeypatch.setattr(openimages, "_CHUNK_BYTES", chunk)
    write({FILE: HEADER + ROWS + line + "\n" + ROWS})
    with pytest.raises(AnnotationError, match=r"imagelabels.csv, line 8: got '.*', expected an ImageID of 16"):
        load_annotations("openimages", root, "train")


def test_other_errors(root, write):
    with pytest.raises(AnnotationError, match=r"None of oidv7-test-annotations-human-imagelabels-boxable.csv"):
        load_annotations("openimages", root, "test")
    with pytest.raises(ValueError, match="class_set: got 'some'"):
        load_annotations("openimages", root, "train", class_set="some")
    write({FILE: "id,label\n" + ROWS})
    for content in ("id,label\n" + ROWS, "id,label", ""):
        write({FILE: content})
        with pytest.raises(AnnotationError, match=r"line 1: got '(id,label)?', expected ImageID,Source"):
            load_annotations("openimages", root, "train")
    write({FILE: HEADER + "000002b66c9c498e,verification,/m/0zzzz,1"})
    with pytest.raises(AnnotationError, match="no row is about one of the 4 classes"):
        load_annotations("openimages", root, "train")
