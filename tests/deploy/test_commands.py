import csv
import io
import json
import shutil
import warnings

import pytest
from PIL import Image

from mlfast import cli
from mlfast.cli.arguments import either_dash
from mlfast.deploy import Predictor


@pytest.fixture
def pictures(tmp_path, arrays):
    """A folder with three images, one in a folder below with the name of another, and a broken file."""
    folder = tmp_path / "pictures"
    (folder / "below").mkdir(parents=True)
    for name, array in (("a.png", arrays[0]), ("b.png", arrays[1]), ("below/a.png", arrays[2])):
        Image.fromarray(array).save(folder / name)
    (folder / "broken.jpg").write_text("no image")
    return folder


def test_predict_table(pictures, model_folder, capsys):
    assert cli.main(["predict", str(model_folder[0]), f"{pictures}/a.png"]) == 0
    captured = capsys.readouterr()
    labels = Predictor(model_folder[0])(pictures / "a.png").labels
    assert captured.out == f"{pictures}/a.png: " + ", ".join(f"{n} {p:.2f}" for n, p in labels.items()) + "\n"
    assert cli.main(["predict", str(model_folder[0]), f"{pictures}/a.png", "--threshold", "1"]) == 0
    assert capsys.readouterr().out == f"{pictures}/a.png: -\n"


def test_predict_names_bad_files_and_goes_on(pictures, tuned_folder, capsys):
    folder = tuned_folder[0]
    assert cli.main(["predict", str(folder), str(pictures), "--format", "json"]) == 1
    captured = capsys.readouterr()
    found = {entry["image"]: entry["labels"] for entry in json.loads(captured.out)}
    assert list(found) == [f"{pictures}/{name}" for name in ("a.png", "b.png", "below/a.png")]
    assert found[f"{pictures}/b.png"] == pytest.approx(Predictor(folder)(pictures / "b.png").labels, abs=1e-5)
    assert f"{pictures}/broken.jpg: cannot identify image" in captured.err
    assert "1 of 4 images could not be read" in captured.err


def test_predict_names_missing_files_and_goes_on(pictures, model_folder, capsys):
    assert cli.main(["predict", str(model_folder[0]), f"{pictures}/nope.png", f"{pictures}/a.png"]) == 1
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{pictures}/a.png: ") and captured.out.count("\n") == 1
    assert f"{pictures}/nope.png: No such file or directory" in captured.err
    assert "1 of 2 images could not be read" in captured.err


def test_predict_names_an_image_that_is_too_large(model_folder, tmp_path, capsys):
    Image.new("1", (10_000, 10_000)).save(tmp_path / "large.png")
    with warnings.catch_warnings(record=True) as caught:
        assert cli.main(["predict", str(model_folder[0]), f"{tmp_path}/large.png"]) == 1
    assert not caught
    assert f"{tmp_path}/large.png: 10000 x 10000 pixels are more than max_pixels=" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["predict", "evaluate", "export", "bench --deployed"])
def test_a_run_is_not_its_model(command, pictures, tmp_path, capsys):
    run = tmp_path / "run"
    for name in ("best", "last"):
        (run / name).mkdir(parents=True)
        (run / name / "model.safetensors").touch()
    (run / "config.yaml").touch()
    arguments = [*command.split(), str(run), *([f"{pictures}/a.png"] if command == "predict" else [])]
    assert cli.main(arguments) == 2
    assert f"{run} is a run; its models are {run}/best and {run}/last\n" in capsys.readouterr().err
    shutil.rmtree(run / "last")
    assert cli.main(arguments) == 2
    assert f"{run} is a run; its model is {run}/best\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["predict", "absent", "x.png", "--batch_size=3"],
        ["evaluate", "absent", "--per_class", "--batch_size", "3", "--tune", "val", "--min_precision=0.9"],
        ["export", "absent", "--fold_thresholds", "--int8", "--format=openvino", "--max_drop=2", "--data_args={}"],
        ["bench", "--deployed", "absent", "--batch_size", "4"],
    ],
)
def test_names_of_options_may_have_either_dash(arguments, capsys):
    assert cli.main(arguments) == 2  # for another reason
    assert "absent does not exist" in capsys.readouterr().err


def test_only_names_of_options_are_changed():
    words = ["a_b", "--c_d=e_f", "--g_h", "i_j", "--", "--k_l"]
    assert either_dash(words, ["--c-d", "--g-h", "--k-l"]) == ["a_b", "--c-d=e_f", "--g-h", "i_j", "--", "--k_l"]


def test_predict_csv_and_pictures(pictures, model_folder, capsys, tmp_path):
    drawn = tmp_path / "drawn"
    arguments = [str(model_folder[0]), f"{pictures}/**/*.png", "--format", "csv", "--draw", str(drawn)]
    assert cli.main(["predict", *arguments]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert {row["image"] for row in rows} == {f"{pictures}/{name}" for name in ("a.png", "b.png", "below/a.png")}
    assert all(0.5 <= float(row["probability"]) <= 1 for row in rows)
    assert sorted(path.name for path in drawn.iterdir()) == ["a-2.png", "a.png", "b.png"]
    with Image.open(drawn / "a.png") as sheet:
        assert sheet.width == 320 and sheet.height > 320
        assert len(sheet.getcolors(1 << 20)) > 50


def test_predict_nothing_readable_is_valid_json(pictures, model_folder, capsys):
    assert cli.main(["predict", str(model_folder[0]), f"{pictures}/broken.jpg", "--format", "json"]) == 1
    assert json.loads(capsys.readouterr().out) == []


def test_evaluate_tunes_and_says_on_what(tmp_path, model_folder, capsys):
    folder = shutil.copytree(model_folder[0], tmp_path / "best")
    arguments = ["evaluate", str(folder), "--data", "digits", "--images", "40"]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "\n0.5 " in out and "adaptive" not in out and "--tune SPLIT chooses others" in out
    assert cli.main([*arguments, "--tune", "train"]) == 0
    out = capsys.readouterr().out
    assert f"thresholds chosen on digits/train, 40 images, for F1: {folder}/thresholds.json" in out
    assert "doubtful: " in out and "fewer than 10 positives for" in out
    first, second = (line for line in out.splitlines() if line.startswith(("0.5 ", "adaptive ")))
    assert first.split()[1] == second.split()[1] and first != second  # the same mAP
    assert "These are the images" not in out
    (folder / "thresholds.json").write_text("stale or broken")  # tuning again is the remedy, so it must work
    assert cli.main([*arguments, "--tune", "val"]) == 0
    flattered = "These are the images that the thresholds were chosen on"
    assert flattered in capsys.readouterr().out
    assert cli.main(arguments) == 0  # later, from the file
    out = capsys.readouterr().out
    assert flattered in out and "as they come with the model, chosen on digits/val, 40 images" in out
    assert cli.main([*arguments, "--split", "train"]) == 0
    assert flattered not in capsys.readouterr().out
    assert (Predictor(folder).thresholds != 0.5).sum() > 20
    chosen = json.loads((folder / "thresholds.json").read_text())
    for entry in chosen["classes"]:
        entry["threshold"] = 0.999
    (folder / "thresholds.json").write_text(json.dumps(chosen))
    assert cli.main(arguments) == 0
    assert "OF1 and CF1 lower with the chosen thresholds than with 0.5" in capsys.readouterr().out
    assert cli.main([*arguments, "--tune", "val", "--shared", "--beta", "2"]) == 0
    assert "for F2, one threshold for all classes" in capsys.readouterr().out
    assert len(set(Predictor(folder).thresholds)) == 1


def test_export(tuned_folder, tmp_path, capsys):
    output = tmp_path / "folded.pt2"
    arguments = [str(tuned_folder[0]), "--format", "torch", "--fold-thresholds", "--output", str(output)]
    assert cli.main(["export", *arguments]) == 0
    assert capsys.readouterr().out.startswith(f"{output}: probabilities of 16 images differ from PyTorch's by at most ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "MODEL", "absent/*.jpg"], "absent/*.jpg: no file or folder matches"),
        (["predict", "MODEL", "IMAGE", "--threshold", "2"], "threshold: got 2.0"),
        (["predict", "MODEL", "IMAGE", "--draw", "."], "--draw: . holds images that are to be read"),
        (["predict", "absent", "IMAGE"], "absent does not exist"),
        (["predict", "model.pt", "IMAGE"], "refused"),
        (["evaluate", "IMAGE", "--data", "digits"], "is not a model"),
        (["evaluate", "MODEL"], "lies in no run of mlfast train"),
        (["evaluate", "MODEL", "--data", "csv"], "csv needs the folder of the data set"),
        (["evaluate", "MODEL", "--data", "cvs"], "--data: got 'cvs', expected one of"),
        (["evaluate", "MODEL", "--data", "digits", "--data_root", "."], "the digits are built in"),
        (["evaluate", "MODEL", "--data", "csv", "--data_args", "3"], "expected a mapping such as"),
        (["evaluate", "MODEL", "--data", "digits", "--split", "test"], "split: got 'test'"),
        (["evaluate", "MODEL", "--data", "digits", "--beta", "2"], "say how --tune SPLIT chooses"),
        (
            ["evaluate", "MODEL", "--data", "digits", "--tune", "val", "--beta", "2", "--min-precision", "0.5"],
            "give one",
        ),
        (["export", "MODEL", "--int8"], "--int8 is for --format openvino"),
        (["export", "MODEL", "--max-drop", "2", "--images", "3"], "--max-drop, --images: for --int8 alone"),
        (["bench", "--deployed", "MODEL", "--runtimes", "tensorrt"], "--runtimes: got 'tensorrt'"),
        (["evaluate", "IMAGE", "--tune", "val"], "is not a model folder"),
        (["export", "absent"], "absent does not exist; expected a model"),
        (["evaluate", "absent"], "absent does not exist; expected a model"),
        (["evaluate", "absent", "--tune", "val"], "absent does not exist; expected a model"),
        (["bench", "--deployed", "absent"], "absent does not exist; expected a model"),
        (["export", "a.png"], "a.png is a file; expected the folder of a model"),
        (["export", "MODEL", "--output", "x.xml"], "ends in .onnx"),
    ],
)
def test_wrong_use_is_one_clear_message_and_status_2(arguments, message, pictures, model_folder, capsys, monkeypatch):
    monkeypatch.chdir(pictures)
    (pictures / "model.pt").touch()
    names = {"MODEL": str(model_folder[0]), "IMAGE": "a.png"}
    assert cli.main([names.get(argument, argument) for argument in arguments]) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith(f"mlfast {arguments[0]}: ") and "Traceback" not in err
