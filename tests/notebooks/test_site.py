"""The site: a reference that is complete; and built without a warning, no link, picture or search entry is broken."""

from __future__ import annotations

import html
import importlib.util
import json
import re
import runpy
import subprocess
import sys
import urllib.parse
from pathlib import Path

import pytest

from tests.test_public_api import PUBLIC

FOLDER = Path(__file__).parents[2] / "notebooks"
REFERENCE = runpy.run_path(str(FOLDER / "reference.py"))["pages"]()


def test_what_a_docstring_names_is_linked_below_it():
    below = REFERENCE["hypergrad"].split(".. autofunction:: attribute\n", 1)[1].split("\n.. auto", 1)[0]
    for name in ("hypergrad.implicit", "hypergrad.unrolled", "hypergrad.inner.gradient"):
        assert f":py:obj:`{name}`" in below


def test_every_public_name_is_in_the_reference():
    """By the shortest path at which it is reached."""
    listed = {
        f"{room}.{name}"
        for room, text in REFERENCE.items()
        for name in re.findall(r"^\.\. auto\w+:: (\w+)", text, re.MULTILINE)
    }
    missing = sorted(set(PUBLIC) - listed)
    assert missing == []
    beside = sorted(path for path in listed - set(PUBLIC) if ".adapters." not in path)
    assert beside == [], "in the reference, and not public"
    assert {f"hypergrad.adapters.{name}.split" for name in ("nnx", "linen", "equinox")} <= listed
    assert "hypergrad.adapters.sklearn.HyperRidge" in listed


def test_every_page_is_reached_from_the_first():
    text = (FOLDER / "index.md").read_text()
    pages = {f"guides/{path.stem}" for path in (FOLDER / "guides").glob("*.md")}
    pages |= {path.stem for path in FOLDER.glob("*.ipynb")} | {"api/index"}
    listed = {line for block in re.findall(r"```\{toctree\}\n(.*?)```", text, re.DOTALL) for line in block.splitlines()}
    assert sorted(pages - listed) == []


def test_code_of_the_guides_is_python_and_the_fifteen_lines_are_fifteen():
    for page in sorted((FOLDER / "guides").glob("*.md")):
        for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
            compile(code, str(page), "exec")
    for library in ("scikit-learn", "flax"):
        lines = [line for code in _own_model(library).values() for line in code.splitlines() if line]
        assert len(lines) <= 15, library


@pytest.mark.experiment
@pytest.mark.usefixtures("once")
@pytest.mark.parametrize(
    ("library", "unwanted", "printed", "least", "most"),
    [
        ("scikit-learn", ("flax", "optax"), r"held-out rows: (0\.\d+)", 0.85, 0.95),
        ("flax", ("sklearn",), r"test   outer loss (\d\.\d+)", 0.2, 1.0),
    ],
)
def test_the_fifteen_lines_tune_a_model_of_one_library_alone(library, unwanted, printed, least, most, capsys):
    code = _own_model(library)["python"]
    assert not any(name in code for name in unwanted)
    exec(code, {})
    found = re.search(printed, capsys.readouterr().out)
    assert found and least < float(found[1]) < most


def _own_model(library: str) -> dict[str, str]:
    """What the guide says of a library, by language: the shell's lines and Python's."""
    page = (FOLDER / "guides" / "own_model.md").read_text()
    part = page.split(f"## From {library} alone", 1)[1].split("\n## ", 1)[0]
    return dict(re.findall(r"```(shell|python)\n(.*?)```", part, re.DOTALL))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    assert importlib.util.find_spec("sphinx"), "the site needs the extra docs: pip install -e '.[docs]'"
    target = tmp_path_factory.mktemp("site")
    arguments = ["-q", "-W", "--keep-going", "-b", "html", "-d", str(target / "doctrees")]
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *arguments, str(FOLDER), str(target / "html")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return target / "html"


@pytest.mark.experiment
def test_the_site_builds_without_a_warning_and_nothing_in_it_is_broken(site):
    pages = sorted(site.rglob("*.html"))
    anchors = {page: set(re.findall(r'\bid="([^"]+)"', page.read_text())) for page in pages}
    broken = []
    for page in pages:
        for target in re.findall(r'\b(?:href|src)="([^"]+)"', page.read_text()):
            url = urllib.parse.urlsplit(html.unescape(target))
            if url.scheme or url.netloc or target.startswith("data:"):
                continue
            at = (page.parent / urllib.parse.unquote(url.path)).resolve() if url.path else page
            at = at / "index.html" if at.is_dir() else at
            if not at.exists():
                broken.append(f"{page.relative_to(site)}: {target}")
            elif url.fragment and at in anchors and urllib.parse.unquote(url.fragment) not in anchors[at]:
                broken.append(f"{page.relative_to(site)}: {target} (no such anchor)")
    assert broken == []
    names = " ".join(page.relative_to(site).as_posix() for page in pages)
    for path in sorted(FOLDER.glob("*.ipynb")):
        assert f"{path.stem}.html" in names
        assert (site / f"{path.stem}.html").read_text().count("<img") >= 1, f"{path.stem}: its pictures are gone"
    index = (site / "searchindex.js").read_text()
    found = json.loads(index.removeprefix("Search.setIndex(").rstrip().removesuffix(")"))
    assert {"hypergradi", "adjoint"} & set(found["terms"]), "the search index knows no word of the field"
    text = json.dumps(found["objects"])
    for name in ("implicit", "unrolled", "tune", "check"):
        assert f'"{name}"' in text, f"the search index does not know {name}"
