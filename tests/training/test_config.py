import dataclasses
import inspect

import pytest
import torch
import yaml

from mlfast.training import ConfigError, TrainConfig
from mlfast.training.terminal import introduction


def test_all_problems_are_listed_at_once():
    wrong = {"lr": "fast", "epochs": 0, "optimizer": "lion", "bach_size": 3, "precision": "int4", "k": 1.5}
    wrong["backbone_args"] = 3
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_dict(wrong)
    assert caught.value.problems == [
        "bach_size: there is no such setting; did you mean batch_size?",
        "backbone_args: got 3, expected a mapping such as {name: value}, with the blank",
        "k: got 1.5, expected from 0 to 1",
        "epochs: got 0, expected at least 1",
        "optimizer: got 'lion', expected one of sgd, adamw",
        "lr: got 'fast', expected a finite number",
        "precision: got 'int4', expected one of fp32, bf16, fp16",
    ]
    assert str(caught.value).startswith("7 problems in the configuration:\n  bach_size")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("lr", 0),
        ("lr", float("nan")),
        ("lr", True),
        ("epochs", 1.0),
        ("epochs", True),
        ("momentum", 1.0),
        ("warmup", 0.0),
        ("name", "a/b"),
        ("name", ""),
        ("name", ".."),
        ("image_size", 16),
        ("prob_shift", -0.1),
        ("ema_decay", 1.0),
        ("seed", -1),
        ("data", "cocoo"),
        ("device", None),
        ("lr", [1]),
    ],
)
def test_wrong_values(setting, value):
    with pytest.raises(ConfigError, match=rf"^1 problem in the configuration:\n  {setting}: got .*, expected "):
        TrainConfig(**{setting: value})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epoch": 4}, r"^TrainConfig: epoch: there is no such setting; did you mean epochs\?$"),
        ({"lr": "x", "learning_rate": 1, "qqqq": 1}, r"did you mean lr\? .*; qqqq: .* mlfast train --help lists them$"),
    ],
)
def test_settings_that_do_not_exist(wrong, message):
    with pytest.raises(TypeError, match=message):
        TrainConfig(**wrong)
    with pytest.raises(TypeError, match=message):
        dataclasses.replace(TrainConfig(), **wrong)
    assert "epochs" in inspect.signature(TrainConfig).parameters


def test_a_batch_must_fit_into_the_training_images():
    with pytest.raises(ConfigError, match=r"batch_size: got 64, expected at most train_images \(32\)"):
        TrainConfig(train_images=32, batch_size=64)


def test_what_does_not_go_together_comes_with_wrong_values():
    wrong = {"epochs": 0, "sam_adaptive": True, "loss": "bce", "margin": 0.1, "batch_size": 0, "train_images": 1}
    wrong |= {"graph": "gat_reweight", "label_vectors": "absent.txt", "sync_batch_norm": True, "device": "cpu"}
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**wrong)
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "epochs", "batch_size", "sam_adaptive", "margin", "sync_batch_norm", "label_vectors"
    ]  # fmt: skip
    TrainConfig(label_vectors="absent.txt")  # nobody reads it


def test_whole_numbers_are_good_for_fractions():
    assert TrainConfig(lr=1, scale=20).lr == 1


def test_round_trip_through_yaml():
    config = TrainConfig(backbone_args={"channels": [8, 16, 24, 32]}, name="x", lr=1e-3)
    assert TrainConfig.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


def test_every_setting_has_help_of_one_line():
    for item in TrainConfig.__dataclass_fields__.values():
        assert item.metadata["group"]
        assert 5 < len(item.metadata["help"]) < 80


def test_who_trains_the_demo_network_on_other_pictures_is_told(tmp_path):
    own = TrainConfig(data="csv", data_root=str(tmp_path))
    told = [
        introduction(config, "data", 3, torch.device("cpu"), 0)
        for config in (own, dataclasses.replace(own, backbone="resnet18"), TrainConfig())
    ]
    assert ["--backbone NAME" in text for text in told] == [True, False, False]
