"""What every project has: a licence, a citation, an address written down once, pages whose paths exist."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import hypergrad as hg

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
PAGES = sorted(
    path
    for name in ("*.md", "experiments/**/*.md", "tests/**/*.md", "notebooks/guides/*.md")
    for path in ROOT.glob(name)
)
# Everything that a reader sees of the project, where its address must not be written a second time.
READ = [*PAGES, ROOT / "CITATION.cff", *ROOT.glob("notebooks/**/*.*"), *ROOT.glob("hypergrad/**/*.py")]
READ = [path for path in READ if path.suffix in (".md", ".cff", ".py", ".ipynb", ".toml")]


def test_the_licence_is_the_one_that_is_named():
    assert PROJECT["license"] == "Apache-2.0" and PROJECT["license-files"] == ["LICENSE"]
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert [author["name"] for author in PROJECT["authors"]] == ["The hypergrad developers"]
    assert "The hypergrad developers" in text


def test_the_citation_is_valid_and_names_this_version():
    """The Citation File Format, version 1.2.0: the keys that it requires, and none that it does not know."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()
    known = (
        "abstract authors cff-version commit contact date-released doi identifiers keywords license license-url message"
    )
    known += " preferred-citation references repository repository-artifact repository-code title type url version"
    assert cited.keys() <= set(known.split())
    assert cited["cff-version"] == "1.2.0" and cited["type"] == "software"
    assert cited["authors"] == [{"name": author["name"]} for author in PROJECT["authors"]]
    assert cited["version"] == hg.__version__, "CITATION.cff names another version than hypergrad/__init__.py"
    assert cited["license"] == PROJECT["license"]


def test_the_address_is_written_down_once_and_there_is_no_badge_without_one():
    addresses = [url.rstrip("/") for url in PROJECT["urls"].values()]
    for page in READ:
        text = page.read_text()
        assert not any(url in text for url in addresses), (
            f"{page}: the project's address stands in pyproject.toml alone"
        )
        if not addresses:
            assert not re.search(r"shields\.io|badge", text), f"{page}: a badge needs an address in [project.urls]"


def test_what_belongs_to_the_project_is_in_the_source_distribution():
    included = PYPROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    folders = {f"/{path.name}" for path in ROOT.iterdir() if path.is_dir() and (path.name in (".ci", ".github"))}
    assert folders | {"/hypergrad", "/tests", "/experiments", "/notebooks", "/LICENSE", "/CITATION.cff"} <= set(
        included
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_path_that_a_page_names_exists(page):
    """Links, and paths that begin in a folder of the project; `NAME` stands for a name."""
    text = page.read_text()
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []
    named = re.findall(r"(?<![\w/.])((?:hypergrad|experiments|tests|notebooks|\.ci)/[\w/.*-]*\w)", text)
    missing = [path for path in named if "NAME" not in path and not list(ROOT.glob(path))]
    assert missing == []


def test_every_slow_test_exists():
    for line in (ROOT / "tests" / "slow.txt").read_text().splitlines():
        file, _, name = line.split("[")[0].partition("::")
        assert (ROOT / file).exists(), line
        assert not name or f"def {name.split('::')[-1]}(" in (ROOT / file).read_text(), line


def test_the_count_of_wins_ties_and_losses_is_that_of_the_experiments_that_are_named():
    text = (ROOT / "README.md").read_text()
    counts = re.search(r"it wins (\d+) times, ties (\d+) times and loses (\d+) times", text)
    assert counts
    for row, count in zip(("wins", "ties", "loses"), counts.groups(), strict=True):
        named = re.search(rf"^\| {row} \| (.+) \|$", text, re.MULTILINE)
        assert named and len(re.findall(r"\]\(experiments/\w+/README\.md\)", named[1])) == int(count), row
