"""README.md and the ops' pages claim what was measured, and what the README shows exists."""

import re
from pathlib import Path

from bench.readme import written

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def test_speeds_are_those_of_the_committed_results():
    for path, text in written().items():
        assert path.read_text() == text, f"{path.name}: run python -m bench.readme"


def test_links_and_pictures_exist():
    targets = re.findall(r"\]\((?!http)([^)#]+)", README)
    assert targets
    assert not [target for target in targets if not (ROOT / target).exists()]


def test_the_example_runs():
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    exec(example, {})
