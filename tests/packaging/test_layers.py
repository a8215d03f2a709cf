"""The rooms of the house: who may import whom, one name per op in every folder, and a light ``import mlfast``."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Each room, and the rooms below it that it may import. Arrows run one way.
MAY_IMPORT = {
    "kernels": set(),
    "integers": set(),
    "files": set(),
    "value_types": set(),
    "graph": {"integers"},
    "sparse_targets": {"integers"},
    "ops": {"kernels", "backends", "graph", "integers", "sparse_targets"},
    "nn": {"ops", "backends", "graph", "integers", "sparse_targets"},
    "models": {"nn", "ops", "backends", "files", "graph", "integers", "sparse_targets", "torchvision_compat"},
    "data": {"files", "torchvision_compat", "value_types"},
    "evaluation": set(),
    "deploy": {"models", "nn", "ops", "evaluation", "data", "files", "backends", "torchvision_compat"},
    "training": {
        "models",
        "nn",
        "ops",
        "data",
        "evaluation",
        "backends",
        "files",
        "sparse_targets",
        "torchvision_compat",
        "value_types",
    },
    "cli": {
        "training",
        "deploy",
        "evaluation",
        "data",
        "models",
        "nn",
        "ops",
        "backends",
        "sparse_targets",
        "torchvision_compat",
    },
    "backends": set(),
    "torchvision_compat": set(),
    "functional": {"ops"},
    "__init__": {"functional", "backends", "graph", "nn", "models", "sparse_targets", "training", "deploy"},
    "__main__": {"cli"},
}


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] == "kernels" else parts[1]


def imported_modules(path: Path) -> set[str]:
    """Every module that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


SOURCES = sorted([*ROOT.glob("mlfast/**/*.py"), *ROOT.glob("kernels/*.py")])


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_run_one_way(path):
    room = room_of(path)
    assert room in MAY_IMPORT, f"{room} is a new room: say in this test what it may import"
    for module in imported_modules(path):
        if module.startswith("mlfast."):
            other = module.split(".")[1]
            known = other in MAY_IMPORT
            assert not known or other == room or other in MAY_IMPORT[room], f"{path}: {room} must not import {other}"


OPS = sorted(path.stem for path in ROOT.glob("mlfast/ops/*.py") if f"\ndef {path.stem}(" in path.read_text())


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_one_name_in_every_folder(op):
    page = ROOT / f"docs/{op}.md"
    folders = "csrc/cpu/{}.cpp kernels/{}.py tests/ops/test_{}.py bench/bench_{}.py docs/{}.md"
    # A formula of its own is for host and device: an op whose page says why it needs no device code needs none either.
    if not page.exists() or "no CUDA C++" not in page.read_text():
        folders += " csrc/math/{}.h csrc/cuda/{}.cu"
    missing = [name for name in folders.replace("{}", op).split() if not (ROOT / name).exists()]
    assert not missing


def test_there_are_ops():
    assert "aam_loss" in OPS


def test_import_pulls_in_torch_and_numpy_only():
    code = (
        "import sys, torch, numpy; before = {name.split('.')[0] for name in sys.modules}\n"
        "import mlfast\n"
        "print(*{name.split('.')[0] for name in sys.modules} - before - set(sys.stdlib_module_names))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.split() == ["mlfast"]


def test_files_are_short():
    for path in [*SOURCES, *ROOT.glob("csrc/**/*.*"), *ROOT.glob("bench/*.py")]:
        assert len(path.read_text().splitlines()) <= 420, f"{path}: would a reader thank you for two files?"
