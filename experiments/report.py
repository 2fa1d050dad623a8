"""Write what was measured into the pages: one table an experiment, and the page that lists them all.

    python experiments/report.py            # after `run.py --seed N --keep`
    python experiments/report.py --check    # exit 1 if a page is out of date
    python experiments/report.py --figures  # draw every picture that is made from the kept numbers, too

Each `experiments/<name>/results.json` holds the numbers by seed, as `run.py --keep` writes them. What is shown of them,
`expected.json` says:

    "table":    {"tuned": "tuned weights", "arms.plain": "plain training"}    rows, by path in the numbers
    "bars":     {"tuned": ">= 0.9"}                                           what the rows are held against
    "headline": "{arms.plain} → {tuned} test accuracy"                        means, for the page of all experiments
    "smoke":    {"tuned": [0, 1]}                                             ranges of a smoke run, for the tests

The table goes between `<!-- measured -->` and `<!-- /measured -->` of the experiment's README, whose title and whose
paragraph after "**Claim.**" go on the page of all experiments.
"""

from __future__ import annotations

import argparse
import json
import math
import operator
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
START, END = "<!-- measured -->", "<!-- /measured -->"
SENSES = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
SIGNS = {">=": "≥", "<=": "≤", ">": "&gt;", "<": "&lt;"}

INTRODUCTION = """# What hypergradients are for

Each experiment puts a method to work on real data, with the public interface alone, beside the rivals that a reviewer
would ask for. The first sentence of its page, repeated here, says what was found, whether that is a win or not. Every
command takes `--seed N`, `--smoke` (its main paths in seconds; the numbers mean nothing), `--json` (the numbers as
one JSON object on the last line) and `--keep` (into `results.json`, from which `python experiments/report.py` makes
this page); many take `--draw` too (the picture of all kept seeds). Measured values are means over seeds; minutes are
the processor time of one seed (the median), which two idle cores do not exceed.

| experiment | found | command | minutes | measured |
|---|---|---|---:|---|"""


class ReportError(Exception):
    """A page cannot be written: what is missing, and where."""


def main(arguments: list[str] | None = None, folder: Path = HERE) -> int:
    """Write, or check, every page below `folder`; the exit code."""
    parser = argparse.ArgumentParser(prog="python experiments/report.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is out of date")
    parser.add_argument("--figures", action="store_true", help="draw the pictures that are made from results.json, too")
    options = parser.parse_args(arguments)
    if options.figures and not options.check:
        for script in drawn(folder):
            subprocess.run([sys.executable, script, "--draw"], check=True)
    try:
        fresh = pages(folder)
    except ReportError as error:
        print(error, file=sys.stderr)
        return 1
    stale = [path for path, text in fresh.items() if not path.exists() or path.read_text() != text]
    for path in stale:
        print(f"{'out of date' if options.check else 'written'}: {path.relative_to(folder.parent)}")
        if not options.check:
            path.write_text(fresh[path])
    return 1 if options.check and stale else 0


def drawn(folder: Path) -> list[Path]:
    """The scripts whose picture `run.py --draw` makes from the kept numbers of all seeds."""
    return [path for path in sorted(folder.glob("*/run.py")) if "draw=drawing" in path.read_text()]


def pages(folder: Path) -> dict[Path, str]:
    """Every generated page, as it should be."""
    found, rows, others = {}, [], []
    for script in sorted(folder.glob("*/run.py")):
        home = script.parent
        page = home / "README.md"
        text = _read(page)
        if not (home / "results.json").exists():
            others.append(f"[{_title(page, text)}]({home.name}/README.md)")
            continue
        expected, results = json.loads(_read(home / "expected.json")), json.loads(_read(home / "results.json"))
        runs = {seed: flat(numbers) for seed, numbers in results.items()}
        found[page] = _between_marks(page, text, table(home.name, expected, runs))
        rows.append(_row(home, text, expected, runs))
    found[folder / "README.md"] = _page(rows, others)
    return found


def flat(numbers: Any, path: str = "") -> dict[str, Any]:
    """`{"arms": {"plain": 1}}` as `{"arms.plain": 1}`; entries of lists by their position."""
    if isinstance(numbers, list):
        numbers = dict(enumerate(numbers))
    if not isinstance(numbers, dict):
        return {path: numbers}
    return {k: v for name, inner in numbers.items() for k, v in flat(inner, f"{path}.{name}" if path else name).items()}


def table(name: str, expected: dict[str, Any], runs: dict[str, dict[str, Any]]) -> str:
    """The measured numbers: a row a key, a column a seed, their mean, and the bar where there is one."""
    bars = expected.get("bars", {})
    columns = ["", *(f"seed {seed}" for seed in runs), "mean", *(["bar"] if bars else [])]
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    for key, text in expected["table"].items():
        values = [_value(name, key, seed, run) for seed, run in runs.items()]
        cells = [f"{text} `{key}`", *map(shown, values), shown(_mean(values))]
        if bars:
            cells.append(_verdict(bars[key], values) if key in bars else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shown(value: Any) -> str:
    """A number as a person reads it; a dash for one that is not finite."""
    if value is None:
        return "–"
    if isinstance(value, (bool, str)):
        return str(value)
    size = abs(value)
    if isinstance(value, int) or size >= 1000:
        return f"{value:,.0f}"
    if size and size < 0.01:
        return f"{value:.2g}"
    return f"{value:.{3 - (size >= 10) - (size >= 100)}f}"


def _value(name: str, key: str, seed: str, run: dict[str, Any]) -> Any:
    if key not in run:
        raise ReportError(f"{name}/results.json: seed {seed} has no {key!r}; run it again with --seed {seed} --keep.")
    return run[key]


def _mean(values: list[Any]) -> Any:
    numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
    if len(numbers) < len(values):
        return None
    mean = math.fsum(numbers) / len(numbers)
    return int(mean) if all(isinstance(v, int) for v in numbers) and mean == int(mean) else mean


def _verdict(bar: str, values: list[Any]) -> str:
    sense, limit = bar.split()
    met = sum(v is not None and SENSES[sense](v, float(limit)) for v in values)
    verdict = "met" if met == len(values) else f"**met in {met} of {len(values)}**" if met else "**missed**"
    return f"{SIGNS[sense]} {limit}: {verdict}"


def _row(home: Path, text: str, expected: dict[str, Any], runs: dict[str, dict[str, Any]]) -> str:
    def mean(match: re.Match[str]) -> str:
        return shown(_mean([_value(home.name, match[1], seed, run) for seed, run in runs.items()]))

    minutes = statistics.median(run["seconds"] for run in runs.values()) / 60
    cells = (
        f"[{_title(home / 'README.md', text)}]({home.name}/README.md)",
        _claim(home / "README.md", text),
        f"`python experiments/{home.name}/run.py --seed 0`",
        f"{minutes:.1f}",
        re.sub(r"\{([^}]+)\}", mean, expected["headline"]),
    )
    return "| " + " | ".join(cells) + " |"


def _page(rows: list[str], others: list[str]) -> str:
    lines = [INTRODUCTION, *rows]
    if others:
        lines += ["", "Measured on pages of their own: " + ", ".join(others) + "."]
    return "\n".join(lines) + "\n"


def _title(page: Path, text: str) -> str:
    if not text.startswith("# "):
        raise ReportError(f"{page}: the first line is not a title.")
    return text.splitlines()[0][2:]


def _claim(page: Path, text: str) -> str:
    found = re.search(r"^\*\*Claim\.\*\*\s+(.+?)\n\s*\n", text, re.DOTALL | re.MULTILINE)
    if not found:
        raise ReportError(f"{page}: no paragraph begins with **Claim.**")
    return " ".join(found[1].split()).replace("|", "\\|")


def _between_marks(page: Path, text: str, inside: str) -> str:
    if text.count(START) != 1 or text.count(END) != 1:
        raise ReportError(f"{page}: the table goes between {START} and {END}, once each.")
    before, rest = text.split(START)
    return f"{before}{START}\n{inside}\n{END}{rest.split(END)[1]}"


def _read(path: Path) -> str:
    if not path.exists():
        raise ReportError(f"{path} is missing.")
    return path.read_text()


if __name__ == "__main__":
    sys.exit(main())
