import json

import numpy as np
import pytest

from mlfast.data import AnnotationError, ImageDataset, ShardStream, load_annotations, shards

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet  # noqa: E402

NAMES = ["cat", "dog", "cow"]
# As `datasets` writes it, in its newer and its older ways.
FEATURES = [
    {"feature": {"names": NAMES, "_type": "ClassLabel"}, "_type": "List"},
    {"feature": {"names": NAMES, "_type": "ClassLabel"}, "_type": "Sequence"},
    [{"names": NAMES, "_type": "ClassLabel"}],
]


@pytest.fixture
def make(tmp_path, jpeg):
    def table(labels, name="train-00000-of-00001.parquet", feature=FEATURES[0], label_type=None):
        image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        schema = pa.schema([("image", image), ("labels", pa.list_(label_type or pa.int64()))])
        if feature:
            info = {"info": {"features": {"image": {"_type": "Image"}, "labels": feature}}}
            schema = schema.with_metadata({"huggingface": json.dumps(info)})
        images = [{"bytes": jpeg((20 * n, 0, 0)), "path": None} for n in range(len(labels))]
        (tmp_path / "data").mkdir(exist_ok=True)
        content = pa.table({"image": images, "labels": labels}, schema=schema)
        pyarrow.parquet.write_table(content, tmp_path / "data" / name, row_group_size=2)
        return tmp_path

    return table


@pytest.mark.parametrize("feature", FEATURES)
def test_class_labels_of_the_schema(make, feature):
    root = make([[0, 2], [1, 1], []], feature=feature)
    a = load_annotations("parquet", root, "train")
    assert a.classes == tuple(NAMES) and a.targets([0, 1, 2]).tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 0]]
    images = ImageDataset(a, size=4)
    assert [round(images[n][0][0].float().mean().item(), -1) for n in (2, 0, 1)] == [40, 0, 20]
    assert sorted(int(image[0, 0, 0] + 9) // 20 for image, _ in ShardStream(images)) == [0, 1, 2]


def test_names_as_labels_and_several_files(make):
    make([["b"], ["a", "c"]], "test-00001.parquet", None, pa.string())
    root = make([["c"]], "test-00000.parquet", None, pa.string())
    a = load_annotations("parquet", root, "test")
    assert a.classes == ("a", "b", "c") and a.targets([0, 1, 2]).tolist() == [[0, 0, 1], [0, 1, 0], [1, 0, 1]]
    np.testing.assert_array_equal(a.shards.position, [[0, 0], [0, 0], [0, 1]])


def test_errors(make):
    root = make([[3]])
    with pytest.raises(AnnotationError, match=r"row group 0, row 0: got the labels \[3\]"):
        load_annotations("parquet", root, "train")
    with pytest.raises(AnnotationError, match="label_column is 'tags', but the columns are"):
        load_annotations("parquet", root, "train", label_column="tags")
    with pytest.raises(AnnotationError, match=r"the column 'labels' is list.* expected a struct"):
        load_annotations("parquet", root, "train", image_column="labels")
    with pytest.raises(AnnotationError, match=r"no val-\*.parquet or val.parquet"):
        load_annotations("parquet", root, "val")


def test_a_pass_unpacks_every_row_group_once_in_whatever_windows(make, monkeypatch):
    root = make([[n % 3] for n in range(12)])  # six row groups
    images = ImageDataset(load_annotations("parquet", root, "train"), size=4)
    calls = []
    real = shards._parquet_file

    class Counting:
        def __init__(self, *arguments):
            self.file = real(*arguments)

        def read_row_group(self, group, *arguments, **options):
            calls.append(group)
            return self.file.read_row_group(group, *arguments, **options)

    monkeypatch.setattr(shards, "_parquet_file", Counting)
    assert sorted(round(int(image[0, 0, 0]) / 20) for image, _ in ShardStream(images, window=8)) == list(range(12))
    assert sorted(calls) == list(range(6))


def test_a_file_that_is_written_again_is_read_again(make):
    root = make([[0], [1]])
    first = ImageDataset(load_annotations("parquet", root, "train"), size=4)[1]
    path = root / "data/train-00000-of-00001.parquet"
    table = pyarrow.parquet.read_table(path)
    pyarrow.parquet.write_table(table.take([1, 0]), path)
    again = ImageDataset(load_annotations("parquet", root, "train"), size=4)[1]
    assert (int(first[0][0, 0, 0]) > 10) and (int(again[0][0, 0, 0]) < 10)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_row_without_an_image_is_broken(make):
    root = make([[0], [1]])
    path = root / "data/train-00000-of-00001.parquet"
    table = pyarrow.parquet.read_table(path)
    empty = pa.array([None, {"bytes": None, "path": "elsewhere.jpg"}], table.schema.field("image").type)
    pyarrow.parquet.write_table(table.set_column(0, table.schema.field("image"), [empty]), path)
    images = ImageDataset(load_annotations("parquet", root, "train"), size=4)
    assert [images[n][1].tolist() for n in (0, 1)] == [[-1] * 3] * 2 and len(images.broken()) == 2


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_damaged_row_group_is_broken_images_and_a_damaged_file_an_error(make):
    root = make([[0], [1], [2], [0]])
    path = root / "data/train-00000-of-00001.parquet"
    annotations = load_annotations("parquet", root, "train")
    whole = path.read_bytes()
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(0).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    path.write_bytes(
        whole[:start] + bytes(column.total_compressed_size) + whole[start + column.total_compressed_size :]
    )
    images = ImageDataset(annotations, size=4)
    for items in ([images[n] for n in range(4)], ShardStream(images)):
        assert sorted(target.tolist() for _, target in items) == [[-1] * 3, [-1] * 3, [0, 0, 1], [1, 0, 0]]
    assert len(images.broken()) == 2
    for content in (b"", b"PAR1", whole[:-20]):
        path.write_bytes(content)
        with pytest.raises(AnnotationError, match=r"00001.parquet: not a whole parquet file"):
            load_annotations("parquet", root, "train")
