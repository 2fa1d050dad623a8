"""Imports run one way: a room of the package uses the rooms below it, and the core uses jax, optax and numpy only."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hypergrad"
FILES = sorted(PACKAGE.rglob("*.py"))
# Classes that extend flax's: the package imports this module only when it is asked for.
LAYERS = PACKAGE / "responses" / "layers.py"

# Low to high; an import may point to its own level or to a lower one.
LEVELS = (
    tuple(file.stem for file in PACKAGE.glob("_*.py") if not file.stem.startswith("__")),  # _tree, _solver, _data, ...
    ("_jaxpr",),
    ("linear", "checkpoints"),
    ("inner", "domains", "responses", "augment", "chunked", "folds"),
    ("unrolling",),
    ("solvers",),
    ("objectives",),
    ("outer",),
    ("diagnostics",),
    ("adapters",),
    ("",),  # hypergrad/__init__.py
    ("_demo",),
    ("__main__",),
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
CORE_IMPORTS = {"jax", "optax", "numpy", "hypergrad"} | set(sys.stdlib_module_names)
# Rooms that exist for an extra; even these import it inside the functions that need it.
EXTRAS = ("flax", "matplotlib", "sklearn", "pandas", "tqdm", "scipy", "chex", "optuna", "orbax", "torch")


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
    assert here in LEVEL, f"{module}: put the new room {here!r} on a level of LEVELS"
    return [
        f"line {line} imports {name}, which is above {here!r}"
        for line, name in imported(tree)
        if LEVEL[room(name)] > LEVEL[here]
    ]


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_imports_point_down(file):
    assert back_arrows(module_name(file), ast.parse(file.read_text())) == []


@pytest.mark.parametrize("file", [file for file in FILES if file != LAYERS], ids=module_name)
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


def test_import_hypergrad_imports_no_extra():
    code = f"import sys, hypergrad; print([m for m in {EXTRAS} if m in sys.modules and m not in before])"
    # optax and jax may bring some of these themselves; what counts is what hypergrad adds.
    code = "import sys, jax, jax.numpy, optax; before = set(sys.modules); " + code
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"
