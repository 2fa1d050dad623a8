"""Imports run one way, in the order of the tree in CONTRIBUTING.md, and the core uses jax, optax and numpy only."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hypergrad"
FILES = sorted(PACKAGE.rglob("*.py"))
# Classes that extend those of flax and scikit-learn: the package imports these modules only when they are asked for.
EXTENDING = (PACKAGE / "responses" / "layers.py", PACKAGE / "adapters" / "sklearn.py")
EXTENDING += (PACKAGE / "adapters" / "_hyper.py", PACKAGE / "adapters" / "_perceptron.py")


def rooms(page: str) -> list[list[str]]:
    """The tree under "Rooms" in CONTRIBUTING.md, one list of names a line, from low to high.

    An import may point to its own line or to one above it. `__init__.py` stands for the package, whose room is "".
    """
    tree = re.search(r"^## Rooms$.*?^```text\nhypergrad/\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert tree, "CONTRIBUTING.md has no tree of rooms"
    lines = [re.match(r"  ((?:\w+(?:\.py|/) ?)+)( .*)?$", line) for line in tree[1].splitlines()]
    assert all(lines), f"a line of the tree that names no room:\n{tree[1]}"
    return [["" if n == "__init__.py" else n.removesuffix(".py").rstrip("/") for n in m[1].split()] for m in lines if m]


def misplaced(levels: list[list[str]], package: Path = PACKAGE) -> list[str]:
    """What stands in no room, in two, or in the tree alone."""
    named = ["__init__" if name == "" else name for line in levels for name in line]
    there = {file.relative_to(package).parts[0].removesuffix(".py") for file in package.rglob("*.py")}
    return sorted((there ^ set(named)) | {name for name in named if named.count(name) > 1})


LEVELS = rooms((ROOT / "CONTRIBUTING.md").read_text())
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
CORE_IMPORTS = {"jax", "optax", "numpy", "hypergrad"} | set(sys.stdlib_module_names)
# Rooms that exist for an extra; even these import it inside the functions that need it.
EXTRAS = ("flax", "matplotlib", "sklearn", "pandas", "tqdm", "scipy", "chex", "optuna", "orbax", "torch", "equinox")
EXTRAS = (*EXTRAS, "blackjax", "matfree")
EXTRAS += ("tensorboardX", "wandb", "mlflow")


def module_name(file: Path, package: Path = PACKAGE) -> str:
    parts = file.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    """`linear` for `hypergrad.linear.cg`, and the empty string for `hypergrad` itself."""
    return (module.split(".") + [""])[1]


def imported(tree: ast.AST, package: Path = PACKAGE) -> list[tuple[int, str]]:
    """(line, absolute name) of every module of this package that is imported anywhere in a file, lazily or not."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: relative import"
            for alias in node.names:
                path = package.parent.joinpath(*f"{node.module}.{alias.name}".split("."))
                is_module = path.is_dir() or path.with_suffix(".py").exists()
                found.append((node.lineno, f"{node.module}.{alias.name}" if is_module else str(node.module)))
    return [(line, name) for line, name in found if name.split(".")[0] == package.name]


def at_module_level(tree: ast.Module) -> list[tuple[int, str]]:
    """(line, top-level name) of what importing the file imports."""
    found, queue = [], list(tree.body)
    while queue:
        node = queue.pop()
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name.split(".")[0]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.lineno, str(node.module).split(".")[0]))
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            queue += list(ast.iter_child_nodes(node))
    return found


def back_arrows(module: str, tree: ast.AST) -> list[str]:
    here = room(module)
    assert here in LEVEL, f"{module} is in no room: give {here!r} a line in the tree of CONTRIBUTING.md"
    return [
        f"line {line} imports {name}, which is above {here!r}"
        for line, name in imported(tree)
        if LEVEL.get(room(name), len(LEVELS)) > LEVEL[here]
    ]


def test_every_module_is_in_one_room_of_the_tree():
    assert misplaced(LEVELS) == [], "CONTRIBUTING.md: each file and folder of hypergrad/ stands on one line of the tree"


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_imports_point_down(file):
    assert back_arrows(module_name(file), ast.parse(file.read_text())) == []


@pytest.mark.parametrize("file", [file for file in FILES if file not in EXTENDING], ids=module_name)
def test_importing_the_core_imports_jax_optax_numpy_only(file):
    outside = [(line, name) for line, name in at_module_level(ast.parse(file.read_text())) if name not in CORE_IMPORTS]
    assert outside == [], "import extras inside the function that needs them, with an error that names the extra"


def test_the_module_graph_has_no_cycle():
    graph = {module_name(f): {n for _, n in imported(ast.parse(f.read_text()))} for f in FILES}
    # A package imports its own modules to export them, which is no use of them.
    graph = {
        name: {n for n in names if n in graph and n != name}
        for name, names in graph.items()
        if not any(other.startswith(f"{name}.") for other in graph)
    }
    done: set[str] = set()
    while ready := [m for m, uses in graph.items() if m not in done and not (uses & graph.keys()) - done]:
        done.update(ready)
    assert sorted(graph.keys() - done) == []


def test_a_back_arrow_is_found():
    for line in (
        "from hypergrad.solvers import implicit",
        "import hypergrad.outer.tune",
        "import hypergrad as hg",
        "from hypergrad import diagnostics",
        "def f():\n    from hypergrad.inner import newton",
    ):
        assert back_arrows("hypergrad.linear.cg", ast.parse(line)), line
    for line in ("from hypergrad import _tree", "from hypergrad.linear._linear import Linear", "import jax"):
        assert not back_arrows("hypergrad.linear.cg", ast.parse(line)), line
    assert at_module_level(ast.parse("try:\n    import flax.nnx\nexcept ImportError:\n    pass")) == [(2, "flax")]
    assert at_module_level(ast.parse("def f():\n    import flax")) == []


def test_the_tree_is_read_in_its_order_and_a_module_outside_of_it_is_found(tmp_path):
    page = (
        "## Rooms\n\n```text\nhypergrad/\n  _tree.py          sums/\n  linear/ other.py  a.py, b\n  __init__.py\n```\n"
    )
    levels = rooms(page)
    assert levels == [["_tree"], ["linear", "other"], [""]]
    for name in ("_tree.py", "__init__.py", "other.py", "linear/cg.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert misplaced(levels, tmp_path) == []
    assert misplaced([*levels, ["other"], ["gone"]], tmp_path) == ["gone", "other"]
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "method.py").touch()
    (tmp_path / "loose.py").touch()
    assert misplaced(levels, tmp_path) == ["loose", "new"]
    for text in ("no tree", page.replace("  linear/ other.py", "  linear, other")):
        with pytest.raises(AssertionError):
            rooms(text)


def test_import_hypergrad_imports_no_extra():
    code = f"import sys, hypergrad; print([m for m in {EXTRAS} if m in sys.modules and m not in before])"
    # optax and jax may bring some of these themselves; what counts is what hypergrad adds.
    code = "import sys, jax, jax.numpy, optax; before = set(sys.modules); " + code
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"
