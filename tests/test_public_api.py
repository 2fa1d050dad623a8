"""Every public name is documented the same way, and the version is in one place."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
import tomllib
import types
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import hypergrad as hg

ROOT = Path(__file__).parents[1]


def public(module: types.ModuleType) -> dict[str, Any]:
    """Public names by path: what a package exports as `name as name`, and what an exported module defines."""
    names: dict[str, Any] = {}
    for name in exported(module):
        value = getattr(module, name)
        if isinstance(value, types.ModuleType):
            names |= public(value)
        else:
            names[f"{module.__name__}.{name}"] = value
    return names


def exported(module: types.ModuleType) -> list[str]:
    tree = ast.parse(inspect.getsource(module))
    names = [
        alias.asname
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
        if alias.asname == alias.name
    ]
    names += [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return [name for name in names if not name.startswith("_")]


def distinct(names: dict[str, Any]) -> dict[str, Any]:
    """One path, the shortest, for each object."""
    found: dict[int, str] = {}
    for path, value in names.items():
        if id(value) not in found or len(path) < len(found[id(value)]):
            found[id(value)] = path
    return {path: names[path] for path in sorted(found.values())}


PUBLIC = distinct(public(hg))
FUNCTIONS = {path: value for path, value in PUBLIC.items() if inspect.isfunction(value)}
CLASSES = {path: value for path, value in PUBLIC.items() if inspect.isclass(value)}


def documented(doc: str, section: str) -> set[str]:
    """The names explained in a Google section (`Args`, `Attributes`)."""
    match = re.search(rf"^(\s*){section}:\n(.*?)(?=^\1\S|\Z)", inspect.cleandoc(doc) + "\n", re.DOTALL | re.MULTILINE)
    if not match:
        return set()
    entries = re.findall(r"^\s+((?:\*{0,2}\w+(?:, )?)+)(?: \([^)]*\))?:", match.group(2), re.MULTILINE)
    return {name.strip(" *") for entry in entries for name in entry.split(",")}


def can_raise(function: Any) -> bool:
    """Whether calling the function raises or checks arguments; what functions inside it do later does not count."""
    queue: list[ast.AST] = list(ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body[0].body)
    while queue:
        node = queue.pop()
        if isinstance(node, ast.Raise) or (isinstance(node, ast.Name) and node.id.startswith("check_")):
            return True
        if not isinstance(node, (ast.FunctionDef, ast.Lambda)):
            queue += ast.iter_child_nodes(node)
    return False


@pytest.mark.parametrize("path", PUBLIC)
def test_every_public_name_has_a_docstring(path):
    own = PUBLIC[path].__dict__.get("__doc__") if inspect.isclass(PUBLIC[path]) else PUBLIC[path].__doc__
    assert own and len(own.strip()) > 20, f"{path} needs a docstring of its own"


@pytest.mark.parametrize("path", FUNCTIONS)
def test_every_argument_is_explained(path):
    missing = set(inspect.signature(FUNCTIONS[path]).parameters) - documented(FUNCTIONS[path].__doc__, "Args")
    assert not missing, f"{path}: say what {sorted(missing)} are, under Args:"


@pytest.mark.parametrize("path", FUNCTIONS)
def test_every_error_is_announced(path):
    if can_raise(FUNCTIONS[path]) or getattr(FUNCTIONS[path], "__options__", {}):
        assert "Raises:" in FUNCTIONS[path].__doc__, f"{path} raises: say what and when, under Raises:"


@pytest.mark.parametrize("path", FUNCTIONS)
def test_every_function_has_an_example(path):
    assert ">>> " in FUNCTIONS[path].__doc__, f"{path}: show it in use (>>> ...)"


@pytest.mark.parametrize("path", CLASSES)
def test_every_field_is_explained(path):
    fields = getattr(CLASSES[path], "_fields", None) or list(getattr(CLASSES[path], "__dataclass_fields__", {}))
    explained = documented(CLASSES[path].__doc__, "Attributes") | documented(CLASSES[path].__doc__, "Args")
    missing = {name for name in fields if not name.startswith("_")} - explained
    assert not missing, f"{path}: say what {sorted(missing)} are, under Attributes:"


def test_options_with_a_default_are_keyword_only_beyond_the_data():
    """`solver(problem, True, 5)` must not be possible: switches and numbers are named by the caller."""
    for path, function in FUNCTIONS.items():
        for parameter in inspect.signature(function).parameters.values():
            if isinstance(parameter.default, bool) and parameter.kind is not parameter.KEYWORD_ONLY:
                pytest.fail(f"{path}: make {parameter.name} keyword-only")


def test_help_names_every_function_and_room():
    doc, errors = inspect.getdoc(hg) or "", ("Error",)
    missing = [name for name in exported(hg) if not name.endswith(errors) and not re.search(rf"\b{name}\b", doc)]
    assert missing == [], "add them to the docstring of hypergrad/__init__.py, which help(hypergrad) prints"


def test_the_version_is_in_one_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" not in project
    assert project["dynamic"] == ["version"]
    if "hypergrad-jax" in {d.metadata["Name"] for d in metadata.distributions() if d.metadata}:
        assert metadata.version("hypergrad-jax") == hg.__version__
    assert hg.__version__ in (ROOT / "CHANGELOG.md").read_text(), "a version needs an entry in CHANGELOG.md"


def test_the_package_is_marked_as_typed():
    assert (ROOT / "hypergrad" / "py.typed").exists()


def test_the_names_of_the_design_are_public():
    expected = """Problem Solver Hypergradient Info Status Result implicit unrolled direct best_response minibatches
        stream tune check constrain raise_if_failed compose
        inner.gradient inner.lbfgs inner.newton inner.fixed_point linear.cg
        linear.neumann linear.gmres linear.nystrom linear.dense linear.identity linear.jacobi linear.precondition
        hypernetwork single_loop responses.linear responses.mlp responses.structured
        self_tuning responses.gated augment.dropout augment.cutout
        domains.positive domains.interval domains.log domains.simplex domains.integer diagnostics.plots.losses
        diagnostics.plots.hyperparameters diagnostics.plots.hypergradient diagnostics.plots.landscape"""
    missing = [name for name in expected.split() if f"hypergrad.{name}" not in public(hg)]
    assert missing == []


def test_documentation_is_read_rightly():
    """The reader of docstrings, on a docstring whose answer is known."""
    doc = """One line.

    Args:
        a: first
            and more: than one line.
        b, c: two at once.
        *rest: others.
        d (float): typed.

    Returns:
        e: not an argument.
    """
    assert {"a", "b", "c", "rest", "d"} <= documented(doc, "Args")
    assert "e" not in documented(doc, "Args")
    assert documented(doc, "Attributes") == set()

    def later():
        def inside():
            raise ValueError

        return inside

    def now():
        if later():
            raise ValueError

    assert can_raise(now)
    assert not can_raise(later)
    assert can_raise(functools.wraps(now)(later))
