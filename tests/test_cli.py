import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

import mlfast
from mlfast import cli

TINY = """\
backbone: test_resnet
image_size: 32
train_images: 64
val_images: 32
batch_size: 16
epochs: 2
lr: 1e-1
device: cpu
"""


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    """Keep the generated images out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY)
    return "tiny.yaml"


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"mlfast {mlfast.__version__}\n"


def test_backends(capsys):
    assert cli.main(["backends"]) == 0
    assert capsys.readouterr().out == f"{mlfast.backends()}\n"


def test_dir_lists_what_is_imported_late():
    assert set(mlfast.__all__) <= set(dir(mlfast))


def test_no_command_explains_the_commands(capsys):
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    assert "train " in out and "backends " in out and "bench " in out


def test_bench_runs_the_folder_of_the_checkout(monkeypatch):
    runs = []
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: runs.append(command) or argparse.Namespace(returncode=1)
    )
    assert cli.main(["bench", "-k", "aam_loss"]) == 1
    assert cli.main(["bench", "--full", "--device", "cuda"]) == 1
    quick, full = runs
    assert quick[1:4] == ["-m", "pytest", "bench"] and "--quick" in quick and quick[-2:] == ["-k", "aam_loss"]
    assert "--quick" not in full and full[-2:] == ["--device", "cuda"]


def test_bench_without_a_checkout_says_how_to_get_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("mlfast.cli.bench.__file__", str(tmp_path / "mlfast" / "cli" / "bench.py"))
    assert cli.main(["bench"]) == 2
    assert 'pip install --editable ".[bench]"' in capsys.readouterr().err


def test_a_pipe_that_closes_early_is_no_error():
    command = f"{sys.executable} -m mlfast recipes | head -1"
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert run.stdout.count("\n") == 1
    assert run.stderr == ""


@pytest.mark.parametrize(
    ("command", "hint"), [("tain", "did you mean train?"), ("findlr", "did you mean find-lr?"), ("xyz", "--help")]
)
def test_unknown_command(command, hint, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([command])
    assert stopped.value.code == 2
    assert re.search(f"'{command}' is no command; .*{re.escape(hint)}", capsys.readouterr().err)


def test_train_help_fits_and_names_every_setting(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--help"])
    assert stopped.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    from mlfast.training import TrainConfig

    for name in TrainConfig.__dataclass_fields__:
        assert sum(line.startswith(f"  --{name} ") for line in lines) == 1
    assert len(lines) < 100 and max(map(len, lines)) <= 120
    for option in ("  --held_out X ", "  --resize squash|crop ", "  --head NAME "):
        assert any(line.startswith(option) for line in lines)


def test_help_loads_nothing_heavy():
    code = (
        "import sys\nfrom mlfast import cli\ntry: cli.main(['train', '--help'])\nexcept SystemExit: pass\n"
        "heavy = {'timm', 'torchvision', 'matplotlib', 'sklearn', 'safetensors', 'triton'}\n"
        "print('loaded:', sorted(heavy & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120).stdout
    assert out.splitlines()[-1] == "loaded: []"


def test_options_go_over_the_file(config, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", config, "--epochs", "7", "--backbone_args", "{x: [8]}", "--name", "2024", "--print_config"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(
            ["train", config, "--set", "epochs=7", "backbone_args={x: [8]}", "--set", "name=2024", "--print_config"]
        )
    assert capsys.readouterr().out == out
    assert "epochs: 7\n" in out and "train_images: 64\n" in out and "lr: 0.1\n" in out and "name: '2024'\n" in out
    assert "resume" not in out


@pytest.mark.parametrize(
    "arguments",
    [
        ["--batch-size", "8", "--name=x", "tiny.yaml", "--print_config"],
        ["--print-config", "tiny.yaml", "--batch_size=8", "--name", "x"],
        ["--set", "batch_size=8", "name=x", "tiny.yaml", "--print-config"],
    ],
)
def test_options_with_either_dash_before_and_behind_the_file(config, capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", *arguments])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert "batch_size: 8\n" in out and "train_images: 64\n" in out and "name: x\n" in out


def test_graph_takes_the_options_of_the_reader(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "labels.csv").write_text("image,tags\na.jpg,dog|grass\nb.jpg,dog|grass\n")
    options = ["--file", "labels.csv", "--label-column", "tags", "--out", "x.png"]
    assert cli.main(["graph", "csv", ".", *options]) == 0
    assert "dog -> grass  1.00" in capsys.readouterr().out


def test_a_warning_is_one_line_without_source_code():
    code = (
        "import warnings\nimport mlfast.cli.recipes\nfrom mlfast import cli\n"
        "before = warnings.formatwarning\n"
        "mlfast.cli.recipes.main = lambda argv: warnings.warn('a.jpg is left out')\n"
        "cli.main(['recipes'])\nassert warnings.formatwarning is before"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stderr == "mlfast recipes: warning: a.jpg is left out\n"


def test_train_from_a_file(config, capsys, tmp_path):
    assert cli.main(["train", config, "--epochs", "1", "--name", "one"]) == 0
    assert "runs/one/curves.png" in capsys.readouterr().out
    assert len((tmp_path / "runs/one/metrics.jsonl").read_text().splitlines()) == 1
    assert cli.main(["train", config, "--name", "one"]) == 2
    assert "runs/one exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr", "x", "--epochs", "0"], "lr: got 'x', expected a finite number"),
        (["--lr", "x", "--epochs", "0"], "epochs: got 0, expected at least 1"),
        (["--bach-size", "3"], "bach-size: there is no such setting; did you mean batch_size?"),
        (["--output_dir", "x"], "output_dir: there is no such setting; did you mean runs_dir? (mlfast train --help"),
        (["--lr", "1", "tiny.yaml", "wrong.yaml"], "got tiny.yaml and wrong.yaml, expected one file or recipe"),
        (["--epochs", "1", "absent.yaml"], "absent.yaml: there is no such file, nor a recipe of that name"),
        (["tiny.yaml", "--runs_dir", "tiny.yaml"], "runs_dir: tiny.yaml/digits-test_resnet-1 cannot be written (Not a"),
        (["wrong.yaml"], "bach_size: there is no such setting; did you mean batch_size?"),
        (["absent.yaml"], "absent.yaml: there is no such file, nor a recipe of that name"),
        (["--backbone", "resnet51"], "unknown backbone 'resnet51'; did you mean"),
        (["--backbone", "test_vit"], "choose a convolutional backbone"),
        (["--backbone_args", "{x: 1}", "--backbone", "test_resnet"], "does not take these arguments ['x']"),
        (["--resume", "absent"], "absent is not a run folder"),
        (["--resume", "absent", "--lr", "1"], "it goes with no other option"),
        (["--resume=absent", "--lr=1"], "it goes with no other option"),
        (["--lr"], "argument --lr: expected one argument"),
    ],
)
def test_wrong_use_is_one_clear_message_and_status_2(config, capsys, arguments, message, tmp_path):
    (tmp_path / "wrong.yaml").write_text("bach_size: 3\n")
    if "--backbone" in arguments:
        arguments = [config, *arguments]
    assert cli.main(["train", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.startswith("mlfast train: ")
    assert "Traceback" not in captured.err
    assert not (tmp_path / "runs").exists()


def test_unknown_keys_of_file_and_options_come_with_all_other_problems(config, capsys, tmp_path):
    (tmp_path / "wrong.yaml").write_text("bach_size: 3\nepoch: 2\nlr: x\nmargin: 0.2\nloss: bce\n")
    arguments = ["wrong.yaml", "--momentumm", "0.8", "--verbose", "--set", "k=2", "seeed=1", "--print_config"]
    assert cli.main(["train", *arguments]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "mlfast train: 8 problems in the configuration:",
        "  momentumm: there is no such setting; did you mean momentum?",
        "  verbose: there is no such setting; mlfast train --help lists them",
        "  seeed: there is no such setting; did you mean seed?",
        "  bach_size: there is no such setting; did you mean batch_size?",
        "  epoch: there is no such setting; did you mean epochs?",
        "  k: got 2, expected from 0 to 1",
        "  lr: got 'x', expected a finite number",
        "  margin: got 0.2 with loss bce, expected 0 (only aam has a margin)",
    ]


@pytest.mark.parametrize("package", ["jsonargparse", "timm", "matplotlib"])
def test_a_missing_package_is_one_line_with_the_remedy(config, package):
    code = f"""
import sys
sys.modules[{package!r}] = None  # to the import system: not installed
from mlfast import cli
sys.exit(cli.main(["train", {config!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert package in done.stderr and 'pip install ".[train]" in a checkout of mlfast' in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="signals as on POSIX")
def test_ctrl_c_saves_and_resume_finishes(config, tmp_path):
    command = [sys.executable, "-m", "mlfast", "train"]
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*command, config, "--epochs", "15", "--name", "stopped"], **pipes)
    metrics = tmp_path / "runs/stopped/metrics.jsonl"
    deadline = time.monotonic() + 90
    while not (metrics.exists() and metrics.read_text().count("\n") >= 1):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; continue with: mlfast train --resume runs/stopped" in err
    assert "Traceback" not in err
    done = metrics.read_text().count("\n")
    assert 1 <= done < 15
    assert (tmp_path / "runs/stopped/curves.png").exists()

    finished = subprocess.run([*command, "--resume", "runs/stopped"], capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    epochs = [json.loads(line)["epoch"] for line in metrics.read_text().splitlines()]
    assert epochs == list(range(1, 16))
