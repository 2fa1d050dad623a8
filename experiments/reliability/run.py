"""The promises of reliability, P1 to P18, each measured in full.

    python experiments/reliability/run.py --seed 0 --json          # about an hour on two idle cores
    python experiments/reliability/run.py --smoke                  # each of them in small; the figures mean nothing
    python experiments/reliability/run.py --only P2 --table        # and its table into FAULTS.md
    python experiments/reliability/run.py --only P15 --keep        # one of them again, into promises.json

Prints a line a promise, and with --json as the last line one JSON object whose keys are P1 to P18, each
`[figure, bar, true or false]`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2])]  # a bare clone works as well as an installation
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402

jax.config.update("jax_enable_x64", True)

from experiments._common import experiment  # noqa: E402
from experiments.reliability import accuracy, agreement, durability, families, robustness  # noqa: E402
from tests.reliability import _index as index  # noqa: E402
from tests.reliability._mistakes import MISTAKES  # noqa: E402

PROMISES = {
    "P1": accuracy.p1,
    "P2": robustness.p2,
    "P3": accuracy.p3,
    "P4": accuracy.p4,
    "P5": agreement.p5,
    "P6": agreement.p6,
    "P7": agreement.p7,
    "P8": durability.p8,
    "P9": durability.p9,
    "P10": durability.p10,
    "P11": robustness.p11,
    "P12": robustness.p12,
    "P13": robustness.p13,
    "P14": robustness.p14,
    "P15": durability.p15,
    "P16": robustness.p16,
    "P17": families.p17,
    "P18": families.p18,
}


RESULTS = Path(__file__).with_name("promises.json")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", type=_promises, default=list(PROMISES), help="some promises, such as P1,P4")
    parser.add_argument("--table", action="store_true", help="write the table of P2 as a page")


def measure(options: argparse.Namespace, numbers: dict[str, Any]) -> None:
    for name in options.only:
        table: list[str] | None = [] if name in PAGES and options.table else None
        extra = {} if table is None else {"table": table}
        figure, bar, met = PROMISES[name](options.seed, options.smoke, **extra)
        numbers[name] = [figure, bar, bool(met)]
        print(f"{name:4} {'met    ' if met else 'NOT MET'} {figure}  (bar: {bar})", flush=True)
        if table:
            file, write = PAGES[name]
            (options.out / file).write_text(write(table))
    if options.keep and options.only != list(PROMISES) and RESULTS.exists():  # the others stay as they were kept
        known = json.loads(RESULTS.read_text()).get(str(options.seed), {}) | numbers
        numbers.clear()
        numbers |= {name: known[name] for name in PROMISES if name in known}


def page(table: list[str]) -> str:
    """What comes of every fault, in Markdown."""
    return "\n".join(
        [
            "# What comes of every fault\n",
            "Written by `run.py --only P2 --table`.\n",
            "## Faults that are values: every solver, in a batch, alone under `jit`, without `jit`\n",
            "A cell is the outcome in a batch; where one of the others differs, it follows by name.\n",
            *table,
            "\n## Wrong arguments: refused by every solver, before anything compiles\n",
            "| | fault | the message holds |",
            "|---|---|---|",
            *(f"| {m.number} | {m.what} | {', '.join(f'`{word}`' for word in m.words)} |" for m in MISTAKES),
            "\n## The others\n",
            *index.rows(),
            "",
        ]
    )


PAGES = {"P2": ("FAULTS.md", page)}


def _promises(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in PROMISES]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}; the promises are {', '.join(PROMISES)}")
    return names


def show(found: dict[str, Any], page: Path) -> None:
    """The figures as a table, where the page has room for them."""
    head, rest = page.read_text().split("<!-- measured -->\n")
    tail = rest.split("<!-- /measured -->")[1]
    rows = [
        f"| {name} | {found[name][0]} | {found[name][1]} | {found[name][2]} |" for name in PROMISES if name in found
    ]
    table = ["| | measured | bar | met |", "|---|---|---|---|", *rows]
    page.write_text(f"{head}<!-- measured -->\n" + "\n".join(table) + f"\n<!-- /measured -->{tail}")


if __name__ == "__main__":
    numbers = experiment(__file__, __doc__, measure, arguments=arguments, kept=RESULTS.name)
    if "--keep" in sys.argv:
        show(numbers, Path(__file__).with_name("README.md"))
