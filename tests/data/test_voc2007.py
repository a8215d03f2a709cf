import pytest

from mlfast.data import AnnotationError, load_annotations
from mlfast.data.voc2007 import CLASSES


def xml(*objects):
    """As distributed: names of the parts of a person one level deeper, difficult absent in some."""
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    text = "".join(
        f"<object><name>{name}</name><pose>Left</pose>{'' if hard is None else f'<difficult>{hard}</difficult>'}"
        f"<bndbox><xmin>1</xmin></bndbox>{part if name == 'person' else ''}</object>"
        for name, hard in objects
    )
    return f"<annotation><folder>VOC2007</folder><filename>x.jpg</filename>{text}</annotation>"


@pytest.fixture
def root(write, jpeg):
    return write(
        {
            "VOCdevkit/VOC2007/ImageSets/Main/trainval.txt": "000005\r\n000007 \r\nmit Umlaut ä\r\n\r\n",
            "VOCdevkit/VOC2007/ImageSets/Main/test.txt": "000001\n",
            "VOCdevkit/VOC2007/Annotations/000005.xml": xml(("chair", 0), ("chair", 0), ("person", 1)),
            "VOCdevkit/VOC2007/Annotations/000007.xml": xml(("car", 1), ("car", 0), ("person", None)),
            "VOCdevkit/VOC2007/Annotations/mit Umlaut ä.xml": xml(),
            "VOCdevkit/VOC2007/Annotations/000001.xml": xml(("dog", 0)),
            "VOCdevkit/VOC2007/JPEGImages/000005.jpg": jpeg(),
        }
    )


@pytest.mark.parametrize("below", ["", "VOCdevkit", "VOCdevkit/VOC2007"])
def test_layout(root, labels_of, below):
    a = load_annotations("voc2007", root / below, "trainval")
    prefix = {"": "VOCdevkit/VOC2007/", "VOCdevkit": "VOC2007/"}.get(below, "")
    assert a.classes == CLASSES and len(a.classes) == 20
    assert labels_of(a) == {
        f"{prefix}JPEGImages/000005.jpg": {"chair", "person"},
        f"{prefix}JPEGImages/000007.jpg": {"car", "person"},
        f"{prefix}JPEGImages/mit Umlaut ä.jpg": set(),
    }


@pytest.mark.parametrize(("difficult", "value"), [("positive", 1), ("unknown", -1), ("negative", 0)])
def test_difficult(root, difficult, value):
    a = load_annotations("voc2007", root, "trainval", difficult=difficult)
    person, car = CLASSES.index("person"), CLASSES.index("car")
    assert a.targets(0)[person] == value
    assert a.targets(1)[[person, car]].tolist() == [1, 1]  # a car that is not difficult is enough
    assert a.targets(0)[car] == 0 and a.notes == ()
    assert a.statistics().labels_per_image == pytest.approx((4 if value == 1 else 3) / 3)


def test_splits_join(root):
    assert len(load_annotations("voc2007", root, "trainval+test")) == 4


def test_errors(root, write):
    base = "VOCdevkit/VOC2007/"
    with pytest.raises(AnnotationError, match=r"val.txt does not exist.*test.txt, trainval.txt"):
        load_annotations("voc2007", root, "val")
    with pytest.raises(ValueError, match="difficult: got 'maybe'"):
        load_annotations("voc2007", root, "test", difficult="maybe")
    write({f"{base}Annotations/000001.xml": xml(("dgo", 0))})
    with pytest.raises(
        AnnotationError, match=r"000001.xml: the label 'dgo' is not one of the 20 classes. Did you mean 'dog'"
    ):
        load_annotations("voc2007", root, "test")
    ignored = load_annotations("voc2007", root, "test", unknown_labels="ignore")
    assert "1 labels that are not classes were left out: 'dgo'" in ignored.notes
    assert load_annotations("voc2007", root, "test", classes=["dgo"]).counts().tolist() == [1]
    write({f"{base}Annotations/000001.xml": xml(), f"{base}ImageSets/Main/test.txt": "000001\n000002\n"})
    with pytest.raises(AnnotationError, match=r"test.txt, line 2: the image '000002' has no annotation"):
        load_annotations("voc2007", root, "test")
    write({f"{base}ImageSets/Main/test.txt": "../../etc/passwd\n"})
    with pytest.raises(AnnotationError, match=r"line 1: got '../../etc/passwd', expected an image's name"):
        load_annotations("voc2007", root, "test")
    with pytest.raises(AnnotationError, match=r"unpack VOCtrainval_06-Nov-2007.tar"):
        load_annotations("voc2007", root / base / "Annotations", "test")
