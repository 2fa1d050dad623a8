"""Makes the .ipynb of every percent-format source here, with its outputs and pictures.

    python notebooks/make.py                # all of them
    python notebooks/make.py quickstart     # one
    python notebooks/make.py --cells        # text and code alone; outputs stay as they are

A cell begins with `# %%`, one of text with `# %% [markdown]`. Where `[project.urls]` in pyproject.toml names an
address, the install cell of the .ipynb installs from there, as Colab needs it; otherwise from the folder above.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
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


if __name__ == "__main__":
    named = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    for source in sources():
        if not named or source.stem in named:
            make(source, execute="--cells" not in sys.argv)
            print(source.stem, flush=True)
