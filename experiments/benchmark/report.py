"""What a bar's measurement returns, how it is printed, and how it is kept."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple


class Setting(NamedTuple):
    """What is asked of a run: the seed of all data, few samples of small problems (`smoke`), size L too (`large`)."""

    seed: int
    smoke: bool = False
    large: bool = False

    @property
    def samples(self) -> int:
        """Rounds of a comparison."""
        return 3 if self.smoke else 15


class Check(NamedTuple):
    """One figure against its bar; `measured` is None where a peer is not installed."""

    what: str
    measured: float | None
    sense: str  # ">=" or "<="
    bar: float

    @property
    def met(self) -> bool | None:
        """Whether the bar is met; None where nothing could be measured."""
        if self.measured is None:
            return None
        if not math.isfinite(self.measured):
            return False
        return self.measured >= self.bar if self.sense == ">=" else self.measured <= self.bar


def result(checks: list[Check], figures: dict[str, Any], skipped: list[str] | None = None) -> dict[str, Any]:
    """The JSON object of one bar: `met` is None where something it needs is not installed and nothing else failed."""
    verdicts = [c.met for c in checks]
    met = False if False in verdicts else None if None in verdicts else True
    return {
        "met": met,
        "checks": [c._asdict() | {"met": c.met} for c in checks],
        "figures": figures,
        "skipped": skipped or [],
    }


def rows(name: str, measured: dict[str, Any]) -> list[str]:
    """The lines of one bar: what, measured, bar, met?"""
    word = {True: "yes", False: "NO", None: "skipped"}
    lines = []
    for c in measured["checks"]:
        value = "-" if c["measured"] is None else f"{c['measured']:.3g}"
        lines.append(f"{name:4} {c['what']:64} {value:>10}   {c['sense']} {c['bar']:<8g} {word[c['met']]}")
    return lines


def rounded(value: Any) -> Any:
    """Four digits, NaN and infinities as None, so that the line is JSON."""
    if isinstance(value, dict):
        return {str(k): rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v) for v in value]
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return value
    if isinstance(value, int):
        return value
    value = float(value)
    return float(f"{value:.4g}") if math.isfinite(value) else None


def keep(found: dict[str, Any], command: str, machine: str, folder: Path) -> None:
    """Write the figures into `expected.json`, and the table of the page between its markers.

    Bars that were not measured this time keep their figures and the command that they are from.
    """
    page, file = folder / "README.md", folder / "expected.json"
    bars = json.loads(file.read_text())["bars"] if file.exists() else {}
    bars |= {name: bar | {"command": command, "machine": machine} for name, bar in rounded(found).items()}
    bars = dict(sorted(bars.items(), key=lambda item: int(item[0].removeprefix("V"))))
    runs: dict[tuple[str, str], list[str]] = {}
    for name, bar in bars.items():
        runs.setdefault((bar["command"], bar["machine"]), []).append(name)
    table = [f"{', '.join(names)}: `{command}`, on {machine}.\n" for (command, machine), names in runs.items()]
    table += ["| bar | what | measured | asked | met |", "|---|---|---:|---|---|"]
    word = {True: "yes", False: "**no**", None: "not measured"}
    for name, bar in bars.items():
        for c in bar["checks"]:
            value = "-" if c["measured"] is None else f"{c['measured']:.3g}"
            sign = "≥" if c["sense"] == ">=" else "≤"
            table.append(f"| {name} | {c['what']} | {value} | {sign} {c['bar']:g} | {word[c['met']]} |")
    head, _, rest = page.read_text().partition("<!-- measured -->\n")
    tail = rest.partition("<!-- /measured -->")[2]
    page.write_text(f"{head}<!-- measured -->\n" + "\n".join(table) + f"\n<!-- /measured -->{tail}")
    file.write_text(json.dumps({"bars": bars}, indent=1) + "\n")
