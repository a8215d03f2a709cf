import json

import pytest

from mlfast.data import AnnotationError, load_annotations
from mlfast.data.coco import splits
from mlfast.data.sources import Sources


def instances(prefix=""):
    """Ids with gaps and out of order, objects of one class repeated, a crowd, an image without objects."""
    objects = [(7, 3, 0), (7, 3, 0), (7, 90, 0), (5, 1, 1)]
    return {
        "info": {},
        "images": [{"id": n, "file_name": f"{prefix}{n:012}.jpg", "height": 4, "width": 4} for n in (7, 5, 6)],
        "annotations": [
            {
                "id": i,
                "image_id": image,
                "category_id": c,
                "iscrowd": crowd,
                "segmentation": [[1, 2]],
                "bbox": [0, 0, 1, 1],
            }
            for i, (image, c, crowd) in enumerate(objects)
        ],
        "categories": [
            {"supercategory": "x", "id": 90, "name": "toothbrush"},
            {"supercategory": "x", "id": 1, "name": "person"},
            {"supercategory": "x", "id": 3, "name": "car"},
        ],
    }


@pytest.fixture
def root(write):
    return write(
        {
            "annotations/instances_val2017.json": json.dumps(instances()),
            "annotations/instances_train2014.json": json.dumps(instances("COCO_train2014_")),
        }
    )


def test_classes_by_id_and_images_without_objects_dropped(root, labels_of):
    a = load_annotations("coco", root, "val")
    assert a.classes == ("person", "car", "toothbrush")
    assert labels_of(a) == {"val2017/000000000007.jpg": {"car", "toothbrush"}, "val2017/000000000005.jpg": {"person"}}
    assert "1 images without labels were dropped" in a.notes
    assert any("COCO 2017" in note and "117266 and 4952" in note for note in a.notes)
    assert a.cooccurrence().together[1].tolist() == [0, 1, 1]  # images, not the two cars


def test_2014_with_all_images(root):
    a = load_annotations("coco", root, "train", year=2014, unlabelled="keep")
    assert len(a) == 3 and a.paths[0] == "train2014/COCO_train2014_000000000007.jpg"
    assert any(note.startswith("COCO 2014, unlabelled images: keep") for note in a.notes)
    assert a.targets(2).tolist() == [0, 0, 0]


def test_errors(root, write):
    with pytest.raises(AnnotationError, match=r"instances_train2017.json does not exist. .*instances_train2014.json"):
        load_annotations("coco", root, "train")
    with pytest.raises(ValueError, match="year: got 2015, expected 2014 or 2017"):
        load_annotations("coco", root, "train", year=2015)
    with pytest.raises(ValueError, match=r"coco has no option 'unlabeled'; .* Did you mean 'unlabelled'"):
        load_annotations("coco", root, "train", unlabeled="keep")

    def broken(change, message):
        content = instances()
        change(content)
        write({"annotations/instances_val2017.json": json.dumps(content)})
        with pytest.raises(AnnotationError, match=message):
            load_annotations("coco", root, "val")

    broken(
        lambda c: c["annotations"][2].update(image_id=99), r"annotations\[2\] has the image_id 99, which is not listed"
    )
    broken(lambda c: c["annotations"][1].update(category_id=2), r"annotations\[1\] has the category_id 2")
    broken(
        lambda c: c["annotations"][3].pop("image_id"), r"missing required field `image_id` - at `\$.annotations\[3\]`"
    )
    broken(lambda c: c["images"][1].update(file_name=5), r"Expected `str`, got `int` - at `\$.images\[1\].file_name`")
    broken(lambda c: c.pop("categories"), "missing required field `categories`; give COCO's instances files")
    broken(lambda c: c["images"][2].update(id=5), r"images\[2\] has the id 5 once more")
    broken(lambda c: c["categories"][2].update(id=90), r"categories\[2\] has the id 90 once more")
    broken(lambda c: c["images"][1].update(file_name="../../x.jpg"), r"images\[1\]: the image path .* is refused")
    for content in (b"", b"{", b"[]", b'{"images": [', b"\xff\xfe{}"):
        write({"annotations/instances_val2017.json": content})
        with pytest.raises(AnnotationError, match=r"instances_val2017.json: .*; give COCO's instances files"):
            load_annotations("coco", root, "val")


def test_the_splits_are_those_that_are_there(root, tmp_path):
    assert splits(Sources(root)) == ["val"] and splits(Sources(root), year=2014) == ["train"]
    assert splits(Sources(tmp_path)) == ["train", "val"]  # reading then says what is missing
