"""Every example in a docstring or in the README runs as printed, from nothing but the names it imports itself."""

from __future__ import annotations

import doctest
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


class Finder(doctest.DocTestFinder):
    """Finds decorated functions too: the standard one leaves out what a decorator from another module returned."""

    def _from_module(self, module: Any, object: Any) -> bool:
        if inspect.isfunction(object) or inspect.isclass(object):
            return object.__module__ == module.__name__
        return super()._from_module(module, object)


def examples(name: str) -> list[doctest.DocTest]:
    # Empty globals: a person who copies the example has no others.
    return [test for test in Finder().find(importlib.import_module(name), globs={}) if test.examples]


def modules() -> list[str]:
    files = [path for path in sorted((ROOT / "hypergrad").rglob("*.py")) if ">>> " in path.read_text()]
    return [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files]


@pytest.mark.parametrize("module", modules())
def test_docstrings(module):
    found = examples(module)
    assert found, f"{module} holds examples that doctest does not see"
    for test in found:
        check(test)


@pytest.mark.parametrize("name", sorted(path.name for path in ROOT.glob("*.md")))
def test_page(name):
    text = (ROOT / name).read_text()
    # A fence directly below an example would be read as its output.
    text = "\n".join("" if line.startswith("```") else line for line in text.splitlines())
    check(doctest.DocTestParser().get_doctest(text, {}, name, str(ROOT / name), 0))


def check(test: doctest.DocTest) -> None:
    report: list[str] = []
    doctest.DocTestRunner(optionflags=FLAGS | doctest.REPORT_NDIFF).run(test, out=report.append)
    if report:
        pytest.fail("".join(report), pytrace=False)


def test_decorated_functions_are_found():
    assert any(test.name == "hypergrad.linear.cg.cg" for test in examples("hypergrad.linear.cg"))


def test_a_wrong_example_fails():
    test = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    with pytest.raises(pytest.fail.Exception, match="- 3"):
        check(test)
