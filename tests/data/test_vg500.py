import json

import pytest

from mlfast.data import AnnotationError, load_annotations

LABELS = {"1.jpg": [0, 499, 499], "2.jpg": [7], "3.jpg": []}


@pytest.fixture
def root(write):
    return write(
        {
            "train_list_500.txt": "1.jpg\n2.jpg\n",
            "test_list_500.txt": "3.jpg\n",
            "vg_category_500_labels_index.json": json.dumps(LABELS),
            "VG_100K/2.jpg": "",
            "VG_100K_2/1.jpg": "",
        }
    )


def test_images_are_found_in_both_folders(root, labels_of):
    a = load_annotations("vg500", root, "train")
    assert labels_of(a) == {"VG_100K_2/1.jpg": {"0", "499"}, "VG_100K/2.jpg": {"7"}}
    assert a.num_classes == 500 and a.notes == ()
    missing = load_annotations("vg500", root, "test")
    assert missing.notes == ("1 images are neither in VG_100K nor in VG_100K_2",)


def test_errors(root, write):
    write({"test_list_500.txt": "3.jpg\n4.jpg\n"})
    with pytest.raises(AnnotationError, match=r"test_list_500.txt, line 2: the image '4.jpg' has no labels"):
        load_annotations("vg500", root, "test")
    for wrong in ([500], [-1], [True], ["7"], 7):
        write({"vg_category_500_labels_index.json": json.dumps(LABELS | {"2.jpg": wrong})})
        with pytest.raises(AnnotationError, match=r"'2.jpg' has .*, expected a list of numbers 0 to 499"):
            load_annotations("vg500", root, "train")
