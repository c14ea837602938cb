"""What the site needs beyond its plugins: docstrings in reStructuredText as Markdown, and formulas as MathML, which needs no script."""

import html
import re
import textwrap
from collections.abc import Callable

import griffe
from latex2mathml.converter import convert

# Indented lines, and empty ones between and after them.
_BLOCK = r"(?P<body>(?: +\S.*\n(?: *\n)*)+)"
_MATH_BLOCK = re.compile(r"^\.\. math::\n(?: *\n)*" + _BLOCK, re.MULTILINE)
_SECTION = re.compile(r"^(?P<title>[A-Z][^:\n]*):\n" + _BLOCK, re.MULTILINE)
# Griffe reads two kinds of sections, with these names; others, which are prose, it would split at colons.
_PARSED = {"Args": "Args", "Example": "Examples"}

# A doctest, a formula, a formula in a line, a piece of code.
_VERBATIM = re.compile(r"(^ *>>> .*\n(?: *\S.*\n)*|^\$\$\n(?:.*\n)+?\$\$\n|:math:`[^`]+`|``[^`]+``)", re.MULTILINE)
_MATH_ROLE = re.compile(r":math:`([^`]+)`")
_REFERENCE_ROLE = re.compile(r":(?:func|class|meth|mod):`([^`]+)`")

_FORMULA = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.+?)\\[)\]]</(?P=tag)>', re.DOTALL)


class Docstrings(griffe.Extension):
    """Translates every docstring before mkdocstrings reads it; names in roles are looked up where the docstring stands."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value, lambda name: _full_name(obj, name))


def markdown(docstring: str, full_name: Callable[[str], str] = str) -> str:
    """The docstring with `.. math::`, roles and free sections in Markdown; its doctests as they are."""
    text = _MATH_BLOCK.sub(_display_formulas, docstring + "\n")
    parts = _VERBATIM.split(text)  # what is verbatim has odd positions
    parts[::2] = [_inline(part, full_name) for part in parts[::2]]
    text = _MATH_ROLE.sub(r"$\1$", "".join(parts))
    return _SECTION.sub(_section, text).rstrip("\n")


def on_page_content(page_html: str, **_: object) -> str:
    """MkDocs calls it for each page: the formulas that arithmatex found, as MathML."""
    return _FORMULA.sub(_mathml, page_html)


def tex_to_mathml(tex: str, display: str = "inline") -> str:
    """An element <math>; ValueError for what the converter doesn't know and would show as it stands."""
    plain = re.sub(r"\\text\{[^}]*\}", lambda found: found[0].replace(r"\_", "_"), " ".join(tex.split()))
    mathml = convert(plain, display=display)
    if "\\" in mathml:
        raise ValueError(f"formula: not all of it is known: {tex.strip()}")
    return mathml


def _mathml(found: re.Match[str]) -> str:
    tex = html.unescape(found["tex"])
    if found["tag"] == "span":
        return tex_to_mathml(tex)
    # What stands side by side with a wide space is a formula each, so that a narrow page can put one below the other.
    formulas = tex.split(r"\qquad")
    if any(formula.count("{") != formula.count("}") for formula in formulas):
        formulas = [tex]
    return f'<div class="formulas">{"".join(tex_to_mathml(formula, "block") for formula in formulas)}</div>'


def _full_name(obj: griffe.Object, name: str) -> str:
    try:
        return obj.resolve(name)
    except griffe.NameResolutionError:
        return name


def _inline(text: str, full_name: Callable[[str], str]) -> str:
    text = text.replace("<", "&lt;").replace(">", "&gt;")  # <x, y> is no tag, >= 0 no quotation
    return _REFERENCE_ROLE.sub(lambda found: f"[`{found[1]}`][{full_name(found[1])}]", text)


def _display_formulas(found: re.Match[str]) -> str:
    """Paragraphs of a block are formulas of their own."""
    formulas = re.split(r"\n\s*\n", textwrap.dedent(found["body"]).strip())
    return "\n" + "".join(f"$$\n{formula}\n$$\n\n" for formula in formulas)


def _section(found: re.Match[str]) -> str:
    title, body = found["title"], found["body"]
    if title in _PARSED:
        return f"{_PARSED[title]}:\n{body}"
    prose = re.sub(r"^ +", "", body, flags=re.MULTILINE)  # griffe makes a box of "Name: text" and indented lines
    return f'<span class="doc-section-title">{title}:</span>\n\n{prose}'
