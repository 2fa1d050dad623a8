"""The reference of the site: a page for every module, with a section for each public name that it is reached by."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import types
from collections.abc import Mapping
from typing import Any

import hypergrad

ADAPTERS = ("nnx", "linen", "equinox", "sklearn", "optuna", "trackers")  # extras, imported when they are asked for


def pages() -> dict[str, str]:
    """The pages of `api/` by name: a section for every public name, under the module that it is reached by."""
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
    places = {id(value_of(f"{room}.{name}")): f"{room}.{name}" for room, found in rooms.items() for name, _ in found}
    for room, entries in rooms.items():
        text = f"# {room}\n\n```{{eval-rst}}\n.. currentmodule:: {room}\n"
        for name, kind in sorted(entries, key=lambda entry: entry[0].lower()):
            text += f"\n.. {kind}:: {name}\n"
            if others := see_also(f"{room}.{name}", places):
                text += f"\n.. seealso:: {', '.join(f':py:obj:`{other}`' for other in others)}\n"
        pages[room] = text + "```\n"
    listed = "\n".join(pages)
    pages["index"] = (
        "# Reference\n\nEvery public name, from its docstring. The pages write `hg` for `hypergrad`.\n\n"
        f"```{{toctree}}\n:maxdepth: 1\n\n{listed}\n```\n"
    )
    return pages


def see_also(path: str, places: Mapping[int, str]) -> list[str]:
    """The public names that a docstring writes as `hg.name`, by where the reference has them, in their order.

    Args:
        path: of the documented object.
        places: of everything in the reference, by identity.
    """
    written = re.findall(r"\bhg\.(\w+(?:\.\w+)*)", inspect.getdoc(value_of(path)) or "")
    found = [places.get(id(value_of(f"hypergrad.{name}"))) for name in written]
    return list(dict.fromkeys(place for place in found if place and place != path))


def value_of(path: str) -> Any:
    """What a dotted path names; None for nothing."""
    value: Any = hypergrad
    for part in path.split(".")[1:]:
        value = getattr(value, part, None)
    return value


def exported(module: types.ModuleType) -> list[str]:
    """What a package exports as `name as name`, and what an exported module defines."""
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
