"""Makes the .ipynb of every percent-format source here, with its outputs and pictures.

    python notebooks/make.py                # all of them
    python notebooks/make.py quickstart     # one
    python notebooks/make.py --cells        # text and code alone; outputs stay as they are
    python notebooks/make.py --reference    # the pages of api/: every public name, by room

A cell begins with `# %%`, one of text with `# %% [markdown]`. Where `[project.urls]` in pyproject.toml names an
address, the install cell of the .ipynb installs from there, as Colab needs it; otherwise from the folder above.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ADAPTERS = ("nnx", "linen", "equinox")
METADATA = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}


def sources() -> list[Path]:
    """The percent-format sources, by name."""
    return sorted(path for path in HERE.glob("*.py") if "# %% [markdown]" in path.read_text().splitlines())


def cells(source: Path) -> list[dict[str, Any]]:
    """The cells of a source, without outputs; ids follow from name and place, and so stay the same."""
    found = []
    for i, part in enumerate(re.split(r"^# %%", source.read_text(), flags=re.MULTILINE)[1:]):
        head, _, body = part.partition("\n")
        name = hashlib.sha256(f"{source.stem} {i}".encode()).hexdigest()[:8]
        if head.strip() == "[markdown]":
            text = re.sub(r"^# ?", "", body.strip(), flags=re.MULTILINE)
            found.append({"cell_type": "markdown", "id": name, "metadata": {}, "source": text})
        else:
            code = _addressed(body.strip())
            found.append(
                {
                    "cell_type": "code",
                    "execution_count": None,
                    "id": name,
                    "metadata": {},
                    "outputs": [],
                    "source": code,
                }
            )
    return found


def _addressed(code: str) -> str:
    """The install cell, from the project's address once it has one."""
    urls = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]["urls"]
    address = urls.get("Repository") or urls.get("Homepage")
    return re.sub(r'"\.\.(\[[\w,]+\])"', rf'"hypergrad-jax\1 @ git+{address}"', code) if address else code


def make(source: Path, *, execute: bool) -> None:
    """Write the .ipynb beside its source."""
    target = source.with_suffix(".ipynb")
    fresh = cells(source)
    if execute:
        import nbformat
        from nbclient import NotebookClient

        notebook = nbformat.from_dict({"cells": fresh, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5})
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(HERE)}}).execute()
        fresh = json.loads(nbformat.writes(notebook))["cells"]
        for cell in fresh:
            cell["metadata"] = {}  # wall times
    elif target.exists():
        kept = {cell["id"]: cell for cell in json.loads(target.read_text())["cells"]}
        for cell in fresh:
            if cell["cell_type"] == "code" and cell["id"] in kept:
                cell |= {name: kept[cell["id"]][name] for name in ("outputs", "execution_count")}
    for cell in fresh:
        text = "".join(cell["source"])
        cell["source"] = text.splitlines(keepends=True)
    notebook = {"cells": fresh, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5}
    target.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n")


def reference() -> dict[str, str]:
    """The pages of `api/` by name: a section for every public name, under the module that it is reached by."""
    import ast
    import inspect
    import types

    def exported(module: types.ModuleType) -> list[str]:
        tree = ast.parse(inspect.getsource(module))
        names = [
            alias.asname
            for node in ast.walk(tree)
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in node.names
            if alias.asname and alias.asname == alias.name
        ]
        names += [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        return [name for name in names if not name.startswith("_")]

    import hypergrad

    rooms: dict[str, list[tuple[str, str]]] = {}
    seen: set[int] = set()
    queue = [hypergrad, *(importlib.import_module(f"hypergrad.adapters.{name}") for name in ADAPTERS)]
    while queue:
        module = queue.pop(0)
        for name in exported(module):
            value = getattr(module, name)
            if isinstance(value, types.ModuleType):
                queue.append(value)
            elif id(value) not in seen:
                seen.add(id(value))
                kind = "autofunction" if inspect.isfunction(value) else "autoclass"
                kind = kind if callable(value) else "autodata"
                rooms.setdefault(module.__name__, []).append((name, kind))
    pages = {}
    for room, entries in rooms.items():
        text = f"# {room}\n\n```{{eval-rst}}\n.. currentmodule:: {room}\n"
        for name, kind in sorted(entries, key=lambda entry: entry[0].lower()):
            text += f"\n.. {kind}:: {name}\n"
        pages[room] = text + "```\n"
    listed = "\n".join(pages)
    pages["index"] = (
        "# Reference\n\nEvery public name, from its docstring. The pages write `hg` for `hypergrad`.\n\n"
        f"```{{toctree}}\n:maxdepth: 1\n\n{listed}\n```\n"
    )
    return pages


if __name__ == "__main__":
    if "--reference" in sys.argv:
        sys.path.insert(0, str(HERE.parent))
        for name, text in reference().items():
            (HERE / "api" / f"{name}.md").write_text(text)
        sys.exit()
    named = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    for source in sources():
        if not named or source.stem in named:
            make(source, execute="--cells" not in sys.argv)
            print(source.stem, flush=True)
