"""The site: `sphinx-build -W notebooks SITE` renders committed outputs and executes nothing.

Pages of the experiments and the changelog are copied from where they live into `_made/`, and the reference is written
into `api/`; git ignores both.
"""

from __future__ import annotations

import re
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
MADE = HERE / "_made"
sys.path[:0] = [str(ROOT), str(HERE)]

import reference

import hypergrad

project = "hypergrad"
author = "The hypergrad developers"
copyright = author
version = release = hypergrad.__version__
ADDRESS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["**.ipynb_checkpoints", "conf.py", "*.py"]
suppress_warnings = ["mystnb.unknown_mime_type"]
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
default_role = "literal"
napoleon_google_docstring, napoleon_numpy_docstring = True, False
html_theme = "furo"
html_title = f"hypergrad {release}"
html_copy_source = False
html_theme_options: dict[str, Any] = {
    "light_css_variables": {"color-brand-primary": "#0072B2", "color-brand-content": "#0072B2"},
    "dark_css_variables": {"color-brand-primary": "#56B4E9", "color-brand-content": "#56B4E9"},
}
if "Repository" in ADDRESS:
    html_theme_options["source_repository"] = ADDRESS["Repository"]


def made() -> None:
    """Copy what lives beside this folder, with a page that shows every experiment by its picture."""
    shutil.rmtree(MADE, ignore_errors=True)
    cards = []
    for page in sorted((ROOT / "experiments").glob("*/README.md")):
        home = MADE / page.parent.name
        home.mkdir(parents=True)
        pictures = sorted(page.parent.glob("*.png"))
        for picture in pictures:
            shutil.copy(picture, home)
        text = re.sub(r"\[([^\]]+)\]\((?!https?:|#)([^)]+)\)", _link(page), page.read_text())
        (home / "README.md").write_text(text)
        title = text.splitlines()[0].removeprefix("# ")
        claim = re.search(r"^\*\*Claim\.\*\*\s+(.+?)\n\s*\n", text, re.DOTALL | re.MULTILINE)
        cards.append(f"## [{title}]({home.name}/README.md)\n")
        if pictures:
            cards.append(f"[![{title}]({home.name}/{pictures[0].name})]({home.name}/README.md)\n")
        if claim:
            cards.append(" ".join(claim[1].split()) + "\n")
    toctree = "\n".join(f"{path.parent.name}/README" for path in sorted(MADE.glob("*/README.md")))
    head = "# Experiments\n\nEach puts a method to work beside the rivals that a reviewer would ask for; the sentence "
    head += "below a\npicture says what was found, whether that is a win or not.\n"
    (MADE / "gallery.md").write_text(
        head + "\n" + "\n".join(cards) + f"\n```{{toctree}}\n:hidden:\n:maxdepth: 1\n\n{toctree}\n```\n"
    )
    shutil.copy(ROOT / "CHANGELOG.md", MADE / "changelog.md")
    citation = (ROOT / "CITATION.cff").read_text()
    (MADE / "citation.md").write_text(
        f"# Citation\n\n`CITATION.cff` of the source says how to cite it:\n\n```yaml\n{citation}```\n"
    )


def _link(page: Path) -> Any:
    """Links to other experiments and to pictures stay; what is not on the site becomes its path."""

    def replaced(match: re.Match[str]) -> str:
        target = (page.parent / match[2]).resolve()
        shown = target.suffix == ".png" or (target.name == "README.md" and target.parent.parent == ROOT / "experiments")
        return match[0] if shown else f"`{target.relative_to(ROOT)}`"

    return replaced


made()
shutil.rmtree(HERE / "api", ignore_errors=True)
(HERE / "api").mkdir()
for name, text in reference.pages().items():
    (HERE / "api" / f"{name}.md").write_text(text)


def setup(app: Any) -> None:
    """Docstrings are written to be read in a terminal; a few signs of theirs mean something else in a page."""
    app.connect("autodoc-process-docstring", _readable)
    app.connect("source-read", _beside)


def _beside(app: Any, name: str, source: list[str]) -> None:
    """Pages name those of experiments by where they are in the project."""
    source[0] = source[0].replace("](../../experiments/", "](../_made/").replace("](../experiments/", "](_made/")


def _readable(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Equations, which are indented, become literal blocks; stars and bars outside of code are plain."""
    fresh: list[str] = []
    for i, line in enumerate(lines):
        before = lines[i - 1].strip() if i else ""
        bare = bool(line.strip()) and not line.lstrip().startswith((">>>", "..."))
        if bare and line.startswith("    ") and not before and fresh and not _in_section(lines, i):
            fresh += ["::", ""]
        fresh.append(line)
    lines[:] = fresh


def _in_section(lines: list[str], i: int) -> bool:
    """Whether line i belongs to `Args:` or another section, or follows one that is indented."""
    for line in reversed(lines[:i]):
        if line.strip() and not line.startswith(" "):
            return bool(re.fullmatch(r"\w+:|:\w+.*|\.\. .*", line.strip()))
    return True
