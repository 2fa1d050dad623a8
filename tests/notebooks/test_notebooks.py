"""Every notebook runs as written, and its .ipynb holds the same cells with outputs and pictures."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import subprocess
import sys
import types
from pathlib import Path

import pytest

from tests._scripts import run_script

FOLDER = Path(__file__).parents[2] / "notebooks"
MAKE = runpy.run_path(str(FOLDER / "make.py"))
SOURCES = MAKE["sources"]()
each = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def test_there_are_nine():
    assert len(SOURCES) == 9
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == {path.stem for path in SOURCES}


@pytest.mark.experiment
@each
def test_a_notebook_runs_as_written(source, tmp_path):
    done = run_script(source, cwd=tmp_path, environment={"MPLBACKEND": "agg"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert "nan" not in re.findall(r"\b\w+\b", done.stdout.lower()), "a number that is none"


@each
def test_the_ipynb_holds_the_same_cells(source):
    kept = json.loads(source.with_suffix(".ipynb").read_text())["cells"]
    fresh = MAKE["cells"](source)
    shown = [("".join(cell["source"]), cell["cell_type"], cell["id"]) for cell in kept]
    assert shown == [(cell["source"], cell["cell_type"], cell["id"]) for cell in fresh], (
        f"python notebooks/make.py {source.stem}"
    )


@each
def test_the_ipynb_was_executed_in_order_and_shows_pictures(source):
    code = [c for c in json.loads(source.with_suffix(".ipynb").read_text())["cells"] if c["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs), "no picture"
    text = "".join("".join(output.get("text", "")) for output in outputs)
    assert not re.search(r"/(?:home|root|work|tmp)/|Warning", text), "a path of one machine, or a warning"
    if source.stem != "your_own_loop":
        assert re.search(r"\btest\b.*\d\.\d", text), "no number on data that nothing was chosen by"
    assert source.with_suffix(".ipynb").stat().st_size < 400_000


@each
def test_the_install_cell_does_nothing_where_hypergrad_is(source):
    code = next(cell for cell in MAKE["cells"](source) if cell["cell_type"] == "code")["source"]
    assert code.startswith("# Installs hypergrad where it is missing")
    extras = re.search(r'SOURCE = "\.\.\[([\w,]+)\]"', code)
    assert extras, "without an address in [project.urls], the folder above"
    exec(code, {})


@pytest.mark.parametrize(("where", "says"), [("beside the project", None), ("in Colab", "Upload the project's folder")])
@each
def test_the_install_cell_without_an_address_installs_the_folder_above_or_says_what_to_do(
    source, where, says, tmp_path, monkeypatch
):
    code = next(cell for cell in MAKE["cells"](source) if cell["cell_type"] == "code")["source"]
    find, ran = importlib.util.find_spec, []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: find(name) if name != "hypergrad" else None)
    monkeypatch.setattr(subprocess, "run", lambda command, **options: ran.append(command))
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    if says:
        monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
        with pytest.raises(ModuleNotFoundError, match=says):
            exec(code, {})
        assert not ran, "there is nothing to install from"
    else:
        (tmp_path / "pyproject.toml").write_text("")
        exec(code, {})
        assert [command[-1] for command in ran] == [re.search(r'SOURCE = "(.+?)"', code)[1]]


def test_an_address_goes_into_the_install_cell(tmp_path, monkeypatch):
    """Colab has no folder above: once the project has an address, the notebook installs from there."""
    home = tmp_path / "notebooks"
    home.mkdir()
    (home / "make.py").write_text((FOLDER / "make.py").read_text())
    (tmp_path / "pyproject.toml").write_text('[project.urls]\nRepository = "https://example.org/a/b"\n')
    (home / "quickstart.py").write_text((FOLDER / "quickstart.py").read_text())
    cells = runpy.run_path(str(home / "make.py"))["cells"](home / "quickstart.py")
    address = "hypergrad-jax[demo] @ git+https://example.org/a/b"
    assert f'SOURCE = "{address}"' in cells[1]["source"]
    find, ran = importlib.util.find_spec, []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: find(name) if name != "hypergrad" else None)
    monkeypatch.setattr(subprocess, "run", lambda command, **options: ran.append(command))
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    monkeypatch.chdir(home.parent.parent)
    exec(cells[1]["source"], {})
    assert [command[1:] for command in ran] == [["-m", "pip", "install", "-q", address]]
