import io
import json
import tarfile

import pytest
import torch

from mlfast.data import AnnotationError, ImageDataset, load_annotations
from mlfast.data.loading import reader
from mlfast.data.sources import Sources


def tar(*members):
    """A shard of (name, bytes or the letter of a file type) in this order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
            else:
                info.type, info.linkname = content.encode(), "/etc/passwd"
                archive.addfile(info)
    return buffer.getvalue()


def labels(*names, **more):
    return json.dumps({"labels": list(names), **more}).encode()


def test_samples_and_their_places(write, jpeg, labels_of):
    first = tar(("a/0001.jpg", jpeg((250, 0, 0))), ("a/0001.json", labels("x", "y")), ("a/0001.txt", b"ignored"))
    deep = "d" * 120  # longer than the name field of a tar header
    members = [("b", tarfile.DIRTYPE.decode()), ("2.json", labels()), ("2.JPG", jpeg((0, 250, 0)))]
    second = tar(*members, (f"{deep}/ä.jpg", jpeg((0, 0, 250))), (f"{deep}/ä.json", labels("x")))
    a = load_annotations("webdataset", write({"train-0.tar": first, "train-1.tar": second}), "train")
    assert labels_of(a) == {
        "train-0.tar/a/0001.jpg": {"x", "y"},
        "train-1.tar/2.JPG": set(),
        f"train-1.tar/{deep}/ä.jpg": {"x"},
    }
    images = ImageDataset(a, size=2)
    colours = torch.stack([images[n][0].float().mean((1, 2)) for n in range(3)])
    assert colours.argmax(1).tolist() == [0, 1, 2]


def test_negatives_and_classes_of_a_file(write, jpeg):
    shard = tar(("1.jpg", jpeg()), ("1.json", labels("b", negatives=["a"])), ("2.jpg", jpeg()), ("2.json", labels()))
    a = load_annotations("webdataset", write({"t-0.tar": shard, "classes.txt": "c\nb\na\n"}), "t")
    assert a.classes == ("c", "b", "a") and a.targets([0, 1]).tolist() == [[-1, 1, 0], [-1, -1, -1]]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("../1.jpg", b"x")], r"t-0.tar, ../1.jpg: the image path .* is refused"),
        ([("/etc/1.jpg", b"x")], "is refused"),
        ([("1.jpg", tarfile.SYMTYPE.decode())], "1.jpg: a link or special file is refused"),
        ([("1.jpg", tarfile.LNKTYPE.decode())], "link or special"),
        ([("1.json", tarfile.FIFOTYPE.decode())], "link or special"),
        ([("1.jpg", b"x")], "the sample '1' has no JSON"),
        ([("1.json", labels("a"))], "the sample '1' has no image"),
        ([("1.jpg", b"x"), ("1.json", b"{")], "1.json: not JSON"),
        ([("1.jpg", b"x"), ("1.json", b"[]")], 'expected {"labels"'),
        ([("1.jpg", b"x"), ("1.json", b" " * (2 << 20))], "bytes are too many"),
        ([("1.txt", b"x")], "holds no image"),
    ],
)
def test_errors(write, members, message):
    with pytest.raises(AnnotationError, match=message):
        load_annotations("webdataset", write({"t-0.tar": tar(*members)}), "t")


def test_damaged_and_missing_shards(write, jpeg):
    whole = tar(("1.jpg", bytes(3000)), ("1.json", labels("a")))
    for content in (b"not a tar file at all", whole[:1000]):
        with pytest.raises(AnnotationError, match=r"t-0.tar: not a whole uncompressed tar file"):
            load_annotations("webdataset", write({"t-0.tar": content}), "t")
    with pytest.raises(AnnotationError, match=r"no val-\*.tar there"):
        load_annotations("webdataset", write({}), "val")


def test_a_shard_that_was_cut_between_two_files_is_refused(write, jpeg):
    whole = tar(("1.jpg", jpeg()), ("1.json", labels("a")), ("2.jpg", jpeg()), ("2.json", labels("a")))
    two_files = 2 * 512 + sum(-(-len(content) // 512) * 512 for content in (jpeg(), labels("a")))
    with pytest.raises(AnnotationError, match=r"t-0.tar: it ends without .* cut off"):
        load_annotations("webdataset", write({"t-0.tar": whole[:two_files]}), "t")
    assert len(load_annotations("webdataset", write({"t-0.tar": whole[: 2 * two_files] + bytes(1024)}), "t")) == 2


def test_a_sample_has_one_image(write, jpeg):
    shard = tar(("1.jpg", jpeg()), ("1.json", labels("a")), ("1.png", jpeg(file_format="PNG")))
    with pytest.raises(AnnotationError, match=r"1.png: the sample has another image, '1.jpg'"):
        load_annotations("webdataset", write({"t-0.tar": shard}), "t")


def test_the_splits_are_those_that_can_be_read(write, jpeg):
    shard = tar(("1.jpg", jpeg()), ("1.json", labels("a")))
    names = ["train-00000-of-00002", "train-00001-of-00002", "train-small-000", "val-0"]
    root = write({f"{name}.tar": shard for name in names})
    splits = reader("webdataset").splits(Sources(root))
    assert splits == ["train", "train-small", "val"]
    assert [len(load_annotations("webdataset", root, split)) for split in splits] == [2, 1, 1]
    with pytest.raises(AnnotationError, match=r"no tra-\*.tar there, the splits are: train, train-small, val"):
        load_annotations("webdataset", root, "tra")
