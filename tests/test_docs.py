"""The README's example runs, its table is the one that the committed rows give, and the docstrings' examples hold."""

import doctest
import importlib
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_readme_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    scope: dict[str, object] = {}
    exec(example, scope)
    assert scope["features"].grad.abs().sum() > 0


def test_readme_table_is_of_committed_rows():
    spec = importlib.util.spec_from_file_location("table", ROOT / "bench/table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.table() in README


@pytest.mark.parametrize("module", ["contrastive", "image_text", "imbalance", "memory", "neighbour", "scale", "schedules", "supervised"])
def test_docstring_examples(module):
    failed, attempted = doctest.testmod(importlib.import_module(f"pairloss.{module}"))
    assert attempted >= 3
    assert failed == 0


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "docs/design.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
