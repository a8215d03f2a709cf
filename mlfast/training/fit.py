"""Starts and continues runs: from settings to data, model, folder and trainer."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mlfast.files import write_text
from mlfast.models.checkpoint import CheckpointError
from mlfast.models.errors import first_line
from mlfast.training.config import TrainConfig
from mlfast.training.data_settings import HELD_OUT_FILE
from mlfast.training.distributed import Processes, joined_processes
from mlfast.training.errors import ConfigError

if TYPE_CHECKING:
    from mlfast.training.history import Record
    from mlfast.training.trainer import Trainer

_PACKAGES = ("timm", "torchvision", "safetensors", "tqdm", "yaml", "matplotlib", "sklearn")
_TRACES = {
    "config.yaml",
    HELD_OUT_FILE,
    "bad_step.json",
    "tensorboard",
}  # of a run that failed in its first epoch


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        run_dir: its folder.
        history: one record an epoch, as in ``metrics.jsonl``.
        best: ``mAP`` and ``epoch`` of the model in ``best``; ``prefix`` is ``"ema_"`` where it is the average.
    """

    run_dir: Path
    history: list[Record]
    best: dict[str, Any]


def fit(config: TrainConfig, *, resume: bool = False, quiet: bool = False) -> RunResult:
    """Train a model in a new run folder.

    Args:
        config: the settings.
        resume: go on with the run of that name if it has begun; for jobs that may be killed and started again at any
            moment.
        quiet: show nothing on the terminal.

    Returns:
        Where the run lies and what it reached.

    Raises:
        ConfigError, ValueError: settings that cannot be run: an unknown backbone, a run folder that exists, ...
        ImportError: a package of the ``train`` extra is missing.
        Interrupted: Ctrl-C or SIGTERM; the run can be continued with `resume`.
        Diverged: the loss is not finite, or float16 does not hold the gradient.
        TrainingError: more images are broken than the settings allow, or a file cannot be written.
    """
    _check_packages()
    if resume and config.name is None:
        raise ConfigError(["name: got nothing, expected the name of the run that resume is about"])
    with joined_processes(config.device) as processes:
        runs_dir = Path(config.runs_dir).expanduser()
        had_runs = runs_dir.exists()
        if resume:
            run_dir = runs_dir / str(config.name)
            if (run_dir / "state.pt").exists():
                _check_same_settings(config, _saved_settings(run_dir), f"{run_dir / 'config.yaml'} (or another name)")
                return _continue(config, run_dir, processes, quiet)
            if _has_begun(run_dir):
                raise ConfigError(
                    [f"name: {run_dir} holds something, but no state.pt to go on from; expected a new name"]
                )
        else:
            run_dir = processes.gather(_new_run_dir(config) if config.name or processes.is_first else Path())[0]
        config = replace(config, name=run_dir.name)
        with _empty_folders_removed([run_dir] if had_runs else [run_dir, runs_dir]), _reproducible(config):
            return _run(create_trainer(config, run_dir, processes, quiet))


def resume(run_dir: str | Path, *, quiet: bool = False) -> RunResult:
    """Continue a run that was stopped, with its own settings. On a CPU the result is that of an uninterrupted run.

    Raises:
        CheckpointError: there is no run to continue in this folder, or its state is damaged.
        Others: as `fit`.
    """
    _check_packages()
    run_dir = Path(run_dir).expanduser()
    config = TrainConfig.from_dict(_saved_settings(run_dir))
    with joined_processes(config.device) as processes:
        return _continue(config, run_dir, processes, quiet)


def _continue(config: TrainConfig, run_dir: Path, processes: Processes, quiet: bool) -> RunResult:
    from mlfast.training.checkpoint import load_state

    state = load_state(run_dir / "state.pt")
    _check_same_settings(config, state.get("config", {}), f"{run_dir / 'state.pt'}")
    # The state replaces all weights, so there is nothing to download again.
    with _reproducible(config):
        return _run(create_trainer(replace(config, pretrained=False), run_dir, processes, quiet, state))


def _saved_settings(run_dir: Path) -> dict[str, Any]:
    import yaml

    if not (run_dir / "config.yaml").is_file():
        raise CheckpointError(f"{run_dir} is not a run folder: it has no config.yaml")
    try:
        settings = yaml.safe_load((run_dir / "config.yaml").read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CheckpointError(f"{run_dir / 'config.yaml'} cannot be read: {first_line(error)}") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{run_dir / 'config.yaml'} is damaged: it holds no settings")
    return settings


def _check_same_settings(config: TrainConfig, saved: dict[str, Any], where: str) -> None:
    """Refuse to go on with what other settings began."""
    problems = [
        f"{name}: got {value!r}, expected {saved[name]!r} as in {where}"
        for name, value in config.binding().items()
        if name in saved and saved[name] != value
    ]
    if problems:
        raise ConfigError(problems)


def _run(trainer: Trainer) -> RunResult:
    with closing(trainer):
        trainer.run()
    return RunResult(trainer.run_dir, trainer.history.records, trainer.best)


def create_trainer(
    config: TrainConfig, run_dir: Path, processes: Processes, quiet: bool, state: dict[str, Any] | None = None
) -> Trainer:
    """Data, model and trainer of a run, in a new folder or with the state to continue from."""
    import yaml

    from mlfast.models import create_model
    from mlfast.training.checkpoint import describe_model
    from mlfast.training.data import create_data
    from mlfast.training.initial_weights import load_initial_weights
    from mlfast.training.labels import graph_arguments
    from mlfast.training.trainer import Trainer

    if config.tensorboard:
        _check_packages(("tensorboard",), "tensorboard")
    device = _device(config.device)
    if config.batch_size % processes.size:
        raise ConfigError(
            [f"batch_size: got {config.batch_size}, expected a multiple of the number of processes, {processes.size}"]
        )
    torch.manual_seed(config.seed)
    data = create_data(config, device, processes.rank, processes.size)
    model = create_model(
        config.backbone,
        len(data.classes),
        head=config.head,
        head_args=config.head_args,
        cosine=config.loss == "aam",
        image_size=config.image_size,
        scale=config.scale if config.loss == "aam" else 1.0,
        pretrained=config.pretrained,
        **graph_arguments(config, data.count_labels, data.classes),
        **config.backbone_args,
    )
    if config.weights and state is None:
        told = load_initial_weights(model, config.weights, data.classes, config.min_match)
        if processes.is_first and not quiet:
            print(told)
    model.to(device)
    if config.grad_checkpointing:
        _checkpoint_activations(model.backbone, config.backbone)
    if config.sync_batch_norm:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if state is None:  # everything that can be wrong has been tried: only now does something appear on disk
        if processes.is_first:
            _make_run_dir(run_dir, yaml.safe_dump(config.to_dict(), sort_keys=False), data.held_out_images)
        processes.wait()
        torch.manual_seed(config.seed + processes.rank)  # the same weights, but not the same dropout
    trainer = Trainer(
        config,
        model,
        data.train,
        data.val,
        data.held_out,
        run_dir,
        describe_model(config, model, data.classes),
        processes,
        quiet,
        data.summary,
    )
    if state is not None:
        trainer.load_state(state)
    return trainer


def _make_run_dir(run_dir: Path, settings: str, held_out: Sequence[str]) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "bad_step.json").unlink(missing_ok=True)  # of a start that failed
        write_text(run_dir / "config.yaml", settings)
        if held_out:
            write_text(run_dir / HELD_OUT_FILE, json.dumps(held_out, indent=0) + "\n")
    except OSError as error:
        raise _unwritable(run_dir, error) from error


def _unwritable(run_dir: Path, error: OSError) -> ConfigError:
    return ConfigError([f"runs_dir: {run_dir} cannot be written ({error.strerror}), expected a folder that can"])


def _check_packages(packages: Sequence[str] = _PACKAGES, extra: str = "train") -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(
                f'training needs {package}, which is not installed: pip install ".[{extra}]" in a checkout of mlfast',
                name=package,
            )


def _checkpoint_activations(backbone: Any, name: str) -> None:
    try:
        backbone.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:  # timm asserts for what has none
        raise ConfigError([f"grad_checkpointing: got True, but {name} of timm does not support it"]) from error


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise ConfigError([f"device: got {name!r}, which torch cannot use here ({first_line(error)})"]) from error
    return device


def _new_run_dir(config: TrainConfig) -> Path:
    """A folder without a run: the one asked for, or the next free number, which then is taken."""
    runs = Path(config.runs_dir).expanduser()
    if config.name is not None:
        if _has_begun(runs / config.name):
            raise ConfigError(
                [
                    f"name: {runs / config.name} exists already, expected a new name "
                    f"(or continue that run: mlfast train --resume {runs / config.name})"
                ]
            )
        return runs / config.name
    stem = f"{config.data}-{config.backbone.replace('/', '_')}"
    number = 1
    while True:
        path = runs / f"{stem}-{number}"
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:  # of another run, which may have begun a moment ago
            number += 1
        except OSError as error:
            raise _unwritable(path, error) from error


def _has_begun(run_dir: Path) -> bool:
    """Whether something else than the traces of a start that failed is there."""
    try:
        names = {path.name for path in run_dir.iterdir()}
    except FileNotFoundError:
        return False
    except NotADirectoryError:
        return True
    return not {name for name in names if not name.endswith(".partial")} <= _TRACES


@contextmanager
def _empty_folders_removed(folders: Sequence[Path]) -> Iterator[None]:
    """Take these back, inner ones first, if the run fails before it has written anything."""
    try:
        yield
    except BaseException:
        with suppress(OSError):  # not empty: something has begun
            for folder in folders:
                folder.rmdir()
        raise


@contextmanager
def _reproducible(config: TrainConfig) -> Iterator[None]:
    """Bind torch to repeatable algorithms during a deterministic run, and let go of it afterwards."""
    before = torch.are_deterministic_algorithms_enabled()
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats itself only with this
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
