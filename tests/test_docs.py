"""Every example in README, docs and docstrings runs, README's tables are those of the committed rows, and the site builds and is whole."""

import doctest
import importlib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
import torch

import pairloss

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = sorted((ROOT / "docs").rglob("*.md"))
QUICK_START = ROOT / "docs/index.md"


def load(path: str) -> ModuleType:
    """A Python file that is in no package."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(page: Path) -> list[str]:
    return [textwrap.dedent(block) for block in re.findall(r"^ *```+ *python\b.*\n((?:.*\n)*?) *```", page.read_text(), re.MULTILINE)]


def test_readme_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    scope: dict[str, object] = {}
    exec(example, scope)
    assert scope["features"].grad.abs().sum() > 0


def test_readme_tables_are_of_committed_rows():
    for table in load("bench/table.py").tables().values():
        assert table in README


def test_calls_that_replace_those_of_other_libraries_run():
    page = (ROOT / "docs/coming-from.md").read_text()
    calls = re.findall(r"^\|[^|]*\| `([^`.][^`]*)`", page, re.MULTILINE)
    assert len(calls) >= 25
    x, y, views, each, queue = (torch.rand(*shape) for shape in [(4, 3), (4, 3), (4, 2, 3), (4, 5, 3), (5, 3)])
    given = {"x": x, "y": y, "features": views, "each": each, "queue": queue, "labels": torch.arange(4) // 2}
    for call in calls:
        assert eval(call, vars(pairloss) | given | {"torch": torch, "N": 4, "scale": 10.0, "bias": -10.0}).isfinite(), call


def of_page(page: Path) -> str:
    return page.relative_to(ROOT / "docs").as_posix()


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page) and page != QUICK_START], ids=of_page)
def test_examples_of_a_page_run_one_after_the_other(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    scope: dict[str, object] = {"__name__": page.stem}
    for block in blocks(page):
        exec(compile(block, page, "exec"), scope)


def test_the_quick_start_shows_that_classes_come_apart(capsys):
    (block,) = blocks(QUICK_START)
    exec(block, {})
    before, after = map(float, re.findall(r"\d\.\d\d", capsys.readouterr().out))
    assert after < before / 2


# Where the public names are, with the examples in it at least.
MODULES = {
    "contrastive": 3, "global_batch": 3, "image_text": 3, "imbalance": 3, "layerwise": 3, "memory": 3, "metrics": 0,
    "neighbour": 3, "nn": 0, "ops": 0, "scale": 3, "schedules": 3, "supervised": 3,
}  # fmt: skip


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module):
    failed, attempted = doctest.testmod(importlib.import_module(f"pairloss.{module}"))
    assert attempted >= MODULES[module]
    assert failed == 0


def public_names() -> dict[str, object]:
    """What users call, by the name that they know it by."""
    names = {f"pairloss.{name}": getattr(pairloss, name) for name in pairloss.__all__}
    for module, kind in ((pairloss.nn, inspect.isclass), (pairloss.schedules, inspect.isfunction)):
        names |= {f"{module.__name__}.{name}": value for name, value in inspect.getmembers(module, kind) if not name.startswith("_")}
    return {name: v for name, v in names.items() if callable(v) and inspect.getmodule(v).__name__.startswith("pairloss")}


def test_examples_of_every_public_module_are_tested():
    assert {inspect.getmodule(value).__name__.removeprefix("pairloss.") for value in public_names().values()} <= set(MODULES)


def test_site_builds_without_warnings_and_is_whole(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    pages = {page.relative_to(tmp_path).as_posix(): page.read_text() for page in tmp_path.rglob("*.html")}
    assert {of_page(page.with_suffix(".html")) for page in PAGES if page.parent.name != "results"} <= set(pages)

    on_pages = {name for page in pages.values() for name in re.findall(r'id="(pairloss\.[\w.]+)"', page)}
    assert set(public_names()) | {f"pairloss.ops.{name}" for name in ("row_stats", "pair_sum", "top_k", "selected_products")} <= on_pages
    for name, page in pages.items():
        text = re.sub(r"<code.*?</code>", "", page, flags=re.DOTALL)
        assert not re.search(r"\.\. math::|:\w+:<?`|arithmatex|\$\$|--8&lt;--|--8<--", text), f"{name}: something is not rendered"
        elsewhere = re.findall(r'<(?:script|img|link|iframe)\b[^>]*\b(?:src|href)="(?:https?:)?//[^"]*', page)
        assert not elsewhere, f"{name}: loaded from elsewhere: {elsewhere}"
        for picture in re.findall(r'<img[^>]*\bsrc="([^":]+)"', page):
            assert (tmp_path / name).parent.joinpath(picture).is_file(), f"{name}: {picture}"
        if name.startswith("losses/") and name != "losses/index.html":
            assert "<math" in page, f"{name}: no formula"
            assert ">Parameters:</span>" in page, f"{name}: no arguments"


HOOKS = "docs_hooks.py"


RST = r"""Sums as of :func:`pair_sum`, of <x, y>,
where :math:`x_i > 0` and ``a < b``:

.. math::
    a < b

    c = \frac{1}{2}

A line that ends so:

Args:
    beta: >= 0.

Raises:
    ValueError: many
        lines.

Example:
    >>> f(x) < 3
    <Tensor>

    Text <again>.
"""
MARKDOWN = r"""Sums as of [`pair_sum`][pairloss.ops.pair_sum], of &lt;x, y&gt;,
where $x_i > 0$ and ``a < b``:


$$
a < b
$$

$$
c = \frac{1}{2}
$$

A line that ends so:

Args:
    beta: &gt;= 0.

<span class="doc-section-title">Raises:</span>

ValueError: many
lines.

Examples:
    >>> f(x) < 3
    <Tensor>

    Text &lt;again&gt;."""


def test_docstrings_as_markdown():
    assert load(HOOKS).markdown(RST, lambda name: f"pairloss.ops.{name}") == MARKDOWN


def test_formulas_as_mathml():
    hooks = load(HOOKS)
    page = r'<p><span class="arithmatex">\(a &lt; b\)</span></p><div class="arithmatex">\[\text{a\_b} \qquad c\]</div>'
    mathml = hooks.on_page_content(page)
    assert mathml.count("<math") == 3, "inline, and one for each side of the wide space"
    assert "a_b" in mathml
    assert "&#x0003C;" in mathml
    assert "\\" not in mathml
    one = hooks.on_page_content(r'<div class="arithmatex">\[\frac{a \qquad b}{c}\]</div>')
    assert one.count("<math") == 1
    with pytest.raises(ValueError, match="unheardof"):
        hooks.tex_to_mathml(r"a + \unheardof{b}")


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
