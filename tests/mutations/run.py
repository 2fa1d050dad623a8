"""Plant one bug after the other and see that the unit tests turn red.

    python tests/mutations/run.py [--only WORDS] [--missing] [--jobs N] [--green] [--json]

Each bug is one edit of a temporary copy of the package. Its own tests run first; where they stay green, all files
that any bug names, none of which is end-to-end. The table README.md beside this file is written line by line. Exits
with 1 if a bug survives.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).parent / "README.md"
SURVIVED = "survived"
sys.path.insert(0, str(ROOT))

from tests.mutations._mutations import MUTATIONS, Mutation

# Everything but end-to-end tests: the demo, doctests, experiments, README.
UNIT = sorted({file for m in MUTATIONS for file in m.tests})


class Result(NamedTuple):
    """Which test noticed, after how long; None if none did."""

    mutation: Mutation
    noticed: str | None
    seconds: float


def copy(folder: Path) -> Path:
    """The package and its tests, as they are."""
    for name in ("hypergrad", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".pytest_cache"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def plant(mutation: Mutation, folder: Path) -> None:
    """Make the edit."""
    path = folder / "hypergrad" / mutation.file
    source = path.read_text()
    if source.count(mutation.old) != 1:
        raise ValueError(
            f"{mutation.what}: the text to replace occurs {source.count(mutation.old)} times in {path.name}"
        )
    path.write_text(source.replace(mutation.old, mutation.new))


def first_failure(folder: Path, files: tuple[str, ...] | list[str]) -> str | None:
    """The first test that fails, or None."""
    files = [file for file in files if (folder / file).exists()]
    if not files:
        return None
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "HYPERGRAD_X64": "1"}
    slow_too = ["-m", "not experiment and not table"]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", *slow_too, *files]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", done.stdout, re.MULTILINE)
    return found.group(1) if found else f"exit {done.returncode}: {(done.stdout + done.stderr)[-300:]}"


def attempt(mutation: Mutation | None) -> Result:
    """Plant a bug in a copy of its own and run the tests; without a bug, all tests, which must be green."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="hypergrad-mutation-") as name:
        folder = copy(Path(name))
        if mutation is None:
            return Result(MUTATIONS[0], first_failure(folder, UNIT), time.perf_counter() - began)
        plant(mutation, folder)
        noticed = first_failure(folder, mutation.tests) or first_failure(folder, UNIT)
    return Result(mutation, noticed, time.perf_counter() - began)


def known() -> dict[str, str]:
    """What the table says of each bug that there still is: the name of a test, or nothing."""
    if not TABLE.exists():
        return {}
    rows = [line.strip("| ").split(" | ") for line in TABLE.read_text().splitlines() if line.count(" | ") == 2]
    return {what: noticed.strip("`") for what, _, noticed in rows if what in {m.what for m in MUTATIONS}}


def table(noticed: dict[str, str]) -> str:
    """The results in Markdown."""
    caught = sum(test != SURVIVED for test in noticed.values())
    lines = [
        "# Seeded bugs",
        "",
        f"`python tests/mutations/run.py` plants {len(MUTATIONS)} bugs, one at a time, in a copy of the package, and",
        f"runs unit tests (no end-to-end ones). Of the {len(noticed)} planted so far **{caught} are caught**.",
        "That command writes this file; `--missing` plants those that it does not name yet.",
        "",
        "Wrong solvers that `hg.check` must refuse are in `_check_bugs.py`, right ones that it must confirm in",
        "`_right_solvers.py`; `pytest -m table tests/mutations` tries them all, as `.ci/run` does.",
        "",
        "| bug | file | first test that fails |",
        "|---|---|---|",
        *(f"| {m.what} | `{m.file}` | `{noticed[m.what]}` |" for m in MUTATIONS if m.what in noticed),
    ]
    return "\n".join(lines) + "\n"


def _chosen(options: argparse.Namespace) -> list[Mutation]:
    done = known() if options.missing else {}
    return [m for m in MUTATIONS if options.only in m.what and m.what not in done]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", metavar="WORDS", help="bugs whose description holds these words")
    parser.add_argument("--missing", action="store_true", help="only bugs of which the table says nothing")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="bugs at once (default: 2)")
    parser.add_argument("--green", action="store_true", help="skip the run without any bug: the suite is known to pass")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    options = parser.parse_args(arguments)
    slow = lambda m: not m.tests[0].startswith("tests/linear")
    chosen = sorted(_chosen(options), key=slow)  # the quick ones first
    if not chosen and not options.missing:
        parser.error(f"--only: no bug is described by {options.only!r}")
    if chosen and not (options.only or options.green) and (broken := attempt(None).noticed):
        print(f"The tests fail without any bug: {broken}", file=sys.stderr)
        sys.exit(1)
    results, written = [], known()
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for future in concurrent.futures.as_completed([pool.submit(attempt, m) for m in chosen]):
            results.append(result := future.result())
            written[result.mutation.what] = (result.noticed or SURVIVED).replace("tests/", "", 1)
            TABLE.write_text(table(written))
            print(f"{result.seconds:5.0f} s  {result.mutation.what}: {result.noticed or SURVIVED}", flush=True)
    survived = [r.mutation.what for r in results if r.noticed is None]
    print(f"{len(results) - len(survived)} of {len(results)} caught" + (f"; survived: {survived}" if survived else ""))
    found = {"caught": len(results) - len(survived), "planted": len(results), "survived": survived}
    if options.json:
        print(json.dumps(found))
    return found


if __name__ == "__main__":
    sys.exit(bool(main()["survived"]))
