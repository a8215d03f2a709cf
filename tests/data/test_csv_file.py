import pytest

from mlfast.data import AnnotationError, load_annotations


def load(write, text, split="train", **options):
    return load_annotations("csv", write({"train.csv": text}), split, **options)


def test_a_column_of_labels(write, labels_of):
    a = load(write, "Image Index,Finding Labels,Age\n1.png,Mass|No Finding,60\n2.png,,40\n", image_column="Image Index")
    assert a.classes == ("Mass", "No Finding")
    assert labels_of(a) == {"1.png": {"Mass", "No Finding"}, "2.png": set()}
    assert "labels of column 'Finding Labels' are split at '|'" in a.notes


def test_fastai(write, labels_of):
    text = "fname,labels,is_valid\r\n000005.jpg,chair,True\r\n7.jpg,car person,False\r\nü ü.jpg,car car,False\r\n"
    options = {"file": "train.csv", "delimiter": " ", "image_folder": "train"}
    assert labels_of(load(write, text, **options)) == {"train/7.jpg": {"car", "person"}, "train/ü ü.jpg": {"car"}}
    val = load(write, text, "val", **options)
    assert labels_of(val) == {"train/000005.jpg": {"chair"}}
    assert val.classes == ("car", "chair", "person")  # those of the whole file: splits agree


def test_ml_decoders_nus_wide(write, labels_of):
    text = "filepath,label,split_name\nimages/0_m.jpg,\"['sky', 'clouds']\",train\nimages/1_m.jpg,[sea],val\n"
    assert labels_of(load(write, text, file="train.csv")) == {"images/0_m.jpg": {"sky", "clouds"}}


def test_a_column_per_class(write):
    text = "image_id;cat;dog;split\n1;1;0;train\n2;-1;1.0;train\n3;nan;;val\n"
    a = load(write, text, image_folder="img", image_suffix=".jpg")
    assert a.classes == ("cat", "dog") and list(a.paths) == ["img/1.jpg", "img/2.jpg", "img/3.jpg"]
    assert a.targets([0, 1, 2]).tolist() == [[1, 0], [-1, 1], [-1, -1]]
    assert list(load(write, text, file="train.csv").paths) == ["1", "2"]
    assert load(write, text, classes=["dog", "cat"]).targets(0).tolist() == [0, 1]


def test_a_row_per_label_is_joined(write, labels_of):
    a = load(write, "image,label\na.jpg,x\nb.jpg,x\na.jpg,y\n")
    assert labels_of(a) == {"a.jpg": {"x", "y"}, "b.jpg": {"x"}}
    assert "1 times an image came again; its labels were joined" in a.notes


def test_quotes_and_separators(write, labels_of):
    a = load(write, 'path\tlabels\n"a,\n1.jpg"\t"x;y, z"\n')
    assert labels_of(a) == {"a,\n1.jpg": {"x", "y, z"}}


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "no column of images|file is empty"),
        ("a,b\n1,2\n", {}, r"no column of images in \['a', 'b'\]; name it with image_column"),
        ("image,labels\n", {}, r"train.csv: there are no rows below the header \['image', 'labels'\]"),
        ("image,labels\nx.jpg\n", {}, r"train.csv, line 2: got 1 fields, expected 2"),
        ("image,labels\nx.jpg,a\ny.jpg,a,b\n", {}, r"line 3: got 3 fields.*'y.jpg,a,b'. Put quotes"),
        ("image,cat,age\nx.jpg,1,61\n", {}, r"line 2: column 'age' holds '61', expected 1, 0, or -1.*class_columns"),
        ("image,cat\nx.jpg,1\n", {"class_columns": ["dog"]}, "class_columns names 'dog', but the columns are"),
        (
            "image,cat\nx.jpg,1\n",
            {"image_column": "file"},
            r"image_column is 'file', but the columns are \['image', 'cat'\]",
        ),
        ("image,cat,cat\nx.jpg,1,1\n", {}, "line 1: the column 'cat' stands there more than once"),
        ("image,labels\n../../x.jpg,a\n", {}, r"line 2: the image path '../../x.jpg' is refused"),
        ("image,labels\nx.jpg,a|b\n", {"classes": ["a"]}, "line 2: the label 'b' is not one of the 1 classes"),
        ("image,labels,split\nx.jpg,a,Train\n", {"file": "train.csv"}, "no row of split 'train'; there are: Train"),
        ('image,labels\n"x.jpg"y,a\n', {}, "train.csv, line 2: .*; close the quote, or double it inside a field"),
        (
            'image,labels\nx.jpg,a\ny.jpg,"b\nz.jpg,c\n',
            {},
            "train.csv, line 3: unexpected end of data; close the quote",
        ),
    ],
)
def test_errors(write, text, options, message):
    with pytest.raises(AnnotationError, match=message):
        load(write, text, **options)


def test_only_fastais_column_has_true_and_false_for_splits(write):
    text = "image,labels,{}\n1.png,a,0\n2.png,b,1\n"
    numbers = {"file": "train.csv", "split_column": "fold"}
    assert list(load(write, text.format("fold"), "0", **numbers).paths) == ["1.png"]
    with pytest.raises(AnnotationError, match="no row of split 'val'; there are: 0, 1"):
        load(write, text.format("fold"), "val", **numbers)
    assert list(load(write, text.format("is_valid"), "val", file="train.csv").paths) == ["2.png"]


def test_of_two_rows_of_an_image_absent_is_stronger_than_unknown(write):
    a = load(write, "image,cat,dog\n1.png,0,1\n1.png,-1,-1\n2.png,-1,0\n")
    assert a.targets([0, 1]).tolist() == [[0, 1], [-1, 0]]


def test_quotes_of_a_label_stay_outside_of_lists(write, labels_of):
    a = load(write, "image,labels\n1.png,'t Hooft|rock 'n'\n2.png,\"['a', 'b']\"\n", delimiter="|")
    assert labels_of(a)["1.png"] == {"'t Hooft", "rock 'n'"}
