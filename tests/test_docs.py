"""The README's example runs, its tables are those that the committed rows give, and the docstrings' examples hold."""

import doctest
import importlib
import importlib.util
import re
from pathlib import Path

import pytest
import torch

import pairloss

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_readme_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    scope: dict[str, object] = {}
    exec(example, scope)
    assert scope["features"].grad.abs().sum() > 0


def test_readme_tables_are_of_committed_rows():
    spec = importlib.util.spec_from_file_location("table", ROOT / "bench/table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for table in module.tables().values():
        assert table in README


def test_calls_that_replace_those_of_other_libraries_run():
    page = (ROOT / "docs/coming-from.md").read_text()
    calls = re.findall(r"^\|[^|]*\| `([^`.][^`]*)`", page, re.MULTILINE)
    assert len(calls) >= 25
    x, y, views, each, queue = (torch.rand(*shape) for shape in [(4, 3), (4, 3), (4, 2, 3), (4, 5, 3), (5, 3)])
    given = {"x": x, "y": y, "features": views, "each": each, "queue": queue, "labels": torch.arange(4) // 2}
    for call in calls:
        assert eval(call, vars(pairloss) | given | {"torch": torch, "N": 4, "scale": 10.0, "bias": -10.0}).isfinite(), call


@pytest.mark.parametrize("module", ["contrastive", "image_text", "imbalance", "memory", "neighbour", "scale", "schedules", "supervised"])
def test_docstring_examples(module):
    failed, attempted = doctest.testmod(importlib.import_module(f"pairloss.{module}"))
    assert attempted >= 3
    assert failed == 0


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
