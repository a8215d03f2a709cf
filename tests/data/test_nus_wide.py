import pytest

from mlfast.data import AnnotationError, load_annotations

CONCEPTS = ["airport", "bear", "sky"]


@pytest.fixture
def root(write):
    """Backslash paths, Windows line ends, blanks behind the flags, as distributed."""
    files = {
        "ConceptsList/Concepts81.txt": "\r\n".join(CONCEPTS),
        "ImageList/Imagelist.txt": "actor\\0001_1.jpg\r\nactor\\0002_2.jpg\r\nzoo\\0003_3.jpg\r\nzoo\\0004_4.jpg\r\n",
        "ImageList/TrainImagelist.txt": "actor\\0001_1.jpg\r\nactor\\0002_2.jpg\r\nzoo\\0003_3.jpg\r\n",
        "ImageList/TestImagelist.txt": "zoo\\0004_4.jpg\n",
    }
    flags = {"airport": "1001", "bear": "0000", "sky": "1010"}
    for concept, all_flags in flags.items():
        folder = "Groundtruth/TrainTestLabels/Labels_"
        files[f"Groundtruth/AllLabels/Labels_{concept}.txt"] = "\n".join(all_flags) + "\n"
        files[f"{folder}{concept}_Train.txt"] = " \r\n".join(all_flags[:3])
        files[f"{folder}{concept}_Test.txt"] = all_flags[3] + " \n"
    return write(files)


def test_official_division(root, labels_of):
    train = load_annotations("nus_wide", root, "train")
    assert train.classes == tuple(CONCEPTS)
    assert labels_of(train) == {"Flickr/actor/0001_1.jpg": {"airport", "sky"}, "Flickr/zoo/0003_3.jpg": {"sky"}}
    assert train.notes == ("1 images without labels were dropped",)
    assert train.statistics().empty_classes == ("bear",)
    assert len(load_annotations("nus_wide", root, "train", unlabelled="keep")) == 3
    assert list(load_annotations("nus_wide", root, "test", image_folder="images").paths) == ["images/zoo/0004_4.jpg"]


def test_division_of_the_user(root, write, labels_of):
    write({"mine.txt": "zoo/0004_4.jpg\nactor\\0001_1.jpg\n"})
    a = load_annotations("nus_wide", root, "train", split_file="mine.txt")
    assert labels_of(a) == {"Flickr/zoo/0004_4.jpg": {"airport"}, "Flickr/actor/0001_1.jpg": {"airport", "sky"}}
    write({"mine.txt": "zoo/0004_4.jpg\nzoo/absent.jpg\n"})
    with pytest.raises(AnnotationError, match=r"mine.txt, line 2: the image 'zoo/absent.jpg' is not in"):
        load_annotations("nus_wide", root, "train", split_file="mine.txt")


def test_errors(root, write):
    with pytest.raises(ValueError, match='split: got \'val\', expected "train" or "test"'):
        load_annotations("nus_wide", root, "val")
    file = "Groundtruth/TrainTestLabels/Labels_bear_Train.txt"
    write({file: "0\n0\n"})
    with pytest.raises(
        AnnotationError, match=r"Labels_bear_Train.txt has 2 lines, but .*TrainImagelist.txt lists 3 images"
    ):
        load_annotations("nus_wide", root, "train")
    write({file: "0\n2\n0\n"})
    with pytest.raises(AnnotationError, match=r"Labels_bear_Train.txt, line 2: got '2', expected 0 or 1"):
        load_annotations("nus_wide", root, "train")
    write({"ImageList/TestImagelist.txt": "..\\..\\x.jpg\n"})
    with pytest.raises(AnnotationError, match=r"TestImagelist.txt, line 1: the image path .* is refused"):
        load_annotations("nus_wide", root, "test")
