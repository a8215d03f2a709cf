"""The usage at the top of every op's page runs as it stands."""

import re
from pathlib import Path

import pytest

from mlfast import functional

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = [*functional.__all__, "graph_attention_complete"]


@pytest.mark.parametrize("page", PAGES)
def test_the_usage_runs(page):
    text = (DOCS / f"{page}.md").read_text()
    usage = re.search(r"```python\n(.*?)```", text.split("\n## ")[0], re.DOTALL)
    assert usage and f"mlfast.functional.{page.removesuffix('_complete')}(" in usage[1]
    exec(usage[1], {})
