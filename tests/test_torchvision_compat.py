"""The torchvision import, in processes of their own: what one import leaves behind would decide the next test."""

import subprocess
import sys
import textwrap

import pytest


def run(code: str, path: str = "") -> str:
    """Run Python code with an extra folder in front of the import path; returns what it prints."""
    code = f"import sys\nif {path!r}: sys.path.insert(0, {path!r})\n" + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def fake(tmp_path):
    """Write a package ``torchvision`` with the given code, which is imported instead of the installed one."""

    def write(code: str) -> str:
        (tmp_path / "torchvision").mkdir()
        (tmp_path / "torchvision" / "__init__.py").write_text(textwrap.dedent(code))
        (tmp_path / "torchvision" / "part.py").write_text("")
        return str(tmp_path)

    return write


IMPORT = """
from mlfast import torchvision_compat
try:
    module = torchvision_compat.import_torchvision()
    print("imported", len(torchvision_compat._fragments))
except BaseException as error:
    print(type(error).__name__, error, len(torchvision_compat._fragments))
"""


def test_the_installed_torchvision_and_timm_import():
    code = """
    import importlib.util
    if importlib.util.find_spec("torchvision") is None or importlib.util.find_spec("timm") is None:
        print("absent")
    else:
        from mlfast.torchvision_compat import import_torchvision
        torchvision = import_torchvision()
        assert import_torchvision() is torchvision
        import timm, torch
        from torchvision.transforms import v2
        print(tuple(v2.Resize(8)(torch.zeros(3, 16, 16)).shape), timm.is_model("resnet18"))
    """
    out = run(code)
    if out == "absent":
        pytest.skip("torchvision or timm is not installed")
    assert out == "(3, 8, 8) True"


def test_a_good_torchvision_is_left_alone(fake):
    assert run(IMPORT, fake("import torchvision.part")) == "imported 0"


@pytest.mark.parametrize(("operators", "declared"), [(["nms"], 1), (["nms", "qnms"], 2)])
def test_missing_operators_are_declared_and_half_imported_modules_dropped(fake, operators, declared):
    path = fake(f"""
        import sys, torch
        assert "torchvision.part" not in sys.modules, "left over from the import that failed"
        import torchvision.part
        for name in {operators!r}:
            if not hasattr(torch.ops.torchvision, name):
                raise RuntimeError(f"operator torchvision::{{name}} does not exist")
    """)
    assert run(IMPORT, path) == f"imported {declared}"


def test_another_failure_passes_through(fake):
    path = fake("raise RuntimeError('operator torchvision::roi_align does not exist')")
    assert run(IMPORT, path) == "RuntimeError operator torchvision::roi_align does not exist 0"


def test_a_missing_dependency_of_torchvision_is_not_taken_for_torchvision(fake):
    out = run(IMPORT, fake("import a_module_nobody_has"))
    assert out == "ModuleNotFoundError No module named 'a_module_nobody_has' 0"


def test_absent_torchvision_names_the_remedy():
    out = run("sys.modules['torchvision'] = None  # to the import system: not installed\n" + IMPORT)
    assert out == 'ModuleNotFoundError torchvision is not installed: pip install ".[train]" in a checkout of mlfast 0'
