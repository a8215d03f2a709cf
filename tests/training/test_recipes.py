"""The recipes are settings that can be trained, and say where they come from."""

import pytest

from mlfast import cli
from mlfast.training import TrainConfig
from mlfast.training.recipes import find_recipe, read_recipe, recipe_names


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_a_valid_configuration(name, tmp_path):
    settings = read_recipe(name).settings
    assert TrainConfig.from_dict(settings | {"data_root": str(tmp_path)}).batch_size == 84
    assert settings["data"] in ("voc2007", "coco", "nus_wide", "vg500", "openimages")
    assert settings["image_size"] in (224, 448, 576, 640)


def test_rates_are_the_papers_times_its_batch():
    rates = {"coco": 0.007, "voc": 0.005, "nus": 0.009, "vg500": 0.005, "openimages": 0.001}
    for name in recipe_names():
        data = name.split("-")[0] if name.split("-")[0] in rates else "coco" if "voc" not in name else "voc"
        settings = read_recipe(name).settings
        assert settings["lr"] == pytest.approx(84 * rates[data]), name
        assert settings["weight_decay"] == pytest.approx(5e-4 / 84, rel=1e-3)


def test_figures_are_given_or_said_to_be_missing():
    figures = {name: (read_recipe(name).mAP, read_recipe(name).gmacs) for name in recipe_names()}
    assert figures["coco-effnetv2s-mld"] == ("88.75", "12.28")
    assert figures["coco-tresnetl-mld-640"] == ("91.3", "73.42")
    assert figures["table7-1-bce"] == ("not stated", "not stated")


def test_names():
    assert find_recipe("coco-effnetv2s-mld").name == "coco-effnetv2s-mld.yaml"
    assert find_recipe("my.yaml") is None and find_recipe("folder/mine") is None
    with pytest.raises(ValueError, match="neither a file nor a recipe; did you mean coco-effnetv2s-mld"):
        find_recipe("coco-effnetv2-mld")


def test_the_list(capsys):
    assert cli.main(["recipes"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n{name} " in out for name in recipe_names())
    assert max(map(len, out.splitlines())) <= 160


def test_train_takes_the_name_of_a_recipe_and_options_go_over_it(capsys, monkeypatch, tmp_path):
    (tmp_path / "mine.yaml").write_text("epochs: 60\nlr: 0.588\n")
    with monkeypatch.context() as patch:
        patch.setattr("mlfast.training.recipes._FOLDER", tmp_path)
        with pytest.raises(SystemExit):
            cli.main(["train", "mine", "--epochs", "2", "--print_config"])
    out = capsys.readouterr().out
    assert "epochs: 2\n" in out and "lr: 0.588\n" in out
    assert cli.main(["train", "coco-effnet"]) == 2
    assert "neither a file nor a recipe" in capsys.readouterr().err
