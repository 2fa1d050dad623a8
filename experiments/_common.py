"""What the experiments share: command line, compile cache, progress, results kept by seed.

    from experiments._common import experiment

    def measure(options, numbers):           # fill in `numbers` as they come: what is there is kept on Ctrl-C
        numbers["tuned"] = ...

    if __name__ == "__main__":
        experiment(__file__, __doc__, measure)

gives `run.py --seed N [--smoke] [--json] [--keep]`. `--keep` writes the numbers of this seed into `results.json` beside
the script, from which `experiments/report.py` makes the tables.

An experiment that passes `draw=drawing` has its picture drawn from the kept numbers of all seeds, after `--keep` and by
`run.py --draw`, which measures nothing:

    def drawing(results):                    # {"0": numbers of seed 0, "1": …} -> a matplotlib figure
        ...
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import jax

T = TypeVar("T")


def experiment(
    file: str,
    about: str | None,
    measure: Callable[[argparse.Namespace, dict[str, Any]], None],
    *,
    draw: Callable[[dict[str, Any]], Any] | None = None,
    arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
    kept: str = "results.json",
) -> dict[str, Any]:
    """Run an experiment from the command line.

    Args:
        file: `__file__` of the script; pictures and results go beside it.
        about: its docstring.
        measure: fills in a dict of numbers (nested dicts and lists may do), and the processor time of what an earlier
            run has measured of them as `seconds_before`. It finds `seed`, `smoke`, `json`, `keep`
            and `out` (the folder of pictures: beside the script for seed 0, else one that is thrown away, unless
            `--out` names one) in its options.
        draw: makes a figure from the kept numbers by seed: `figure.png`, drawn after `--keep` and by `--draw`.
        arguments: adds arguments of this experiment alone.
        kept: where `--keep` writes; another name keeps the numbers out of `experiments/report.py`.

    Returns:
        The numbers, rounded to four digits, with `seed` and `seconds` (of processor time, which other work on the
        machine does not stretch).
    """
    here = Path(file).resolve().parent
    parser = argparse.ArgumentParser(
        prog=f"python experiments/{here.name}/run.py",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--seed", type=_natural, default=0, metavar="N", help="of data and training (default: 0)")
    parser.add_argument("--smoke", action="store_true", help="every path in seconds; the numbers mean nothing")
    parser.add_argument("--json", action="store_true", help="print the numbers as one JSON object on the last line")
    parser.add_argument("--keep", action="store_true", help=f"write the numbers of this seed into {kept}")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where pictures go (default: beside the script, with seed 0 alone)"
    )
    if draw:
        parser.add_argument("--draw", action="store_true", help=f"draw figure.png from {kept}; measure nothing")
    arguments(parser)
    options = parser.parse_args()
    if draw and options.draw:
        _draw(draw, here, kept)
        return {}
    if options.keep and options.smoke:
        parser.error("argument --keep: the numbers of a smoke run mean nothing")
    if options.out is None and options.seed == 0 and not options.smoke:
        options.out = here
    if options.out and not (options.out.is_dir() and os.access(options.out, os.W_OK)):
        parser.error(f"argument --out: there is no folder {options.out} that can be written")
    if options.smoke:  # what is compiled is hardly run; read when JAX first computes
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
    print(_keep_compiled_code(), flush=True)
    began = time.process_time()
    numbers: dict[str, Any] = {}
    interrupted = False
    with tempfile.TemporaryDirectory() as nowhere:
        options.out = options.out or Path(nowhere)
        try:
            measure(options, numbers)
        except KeyboardInterrupt:
            interrupted = True
            print("\nInterrupted; what was measured so far:", file=sys.stderr)
    seconds = time.process_time() - began + numbers.pop("seconds_before", 0.0)
    found = {"seed": options.seed, **rounded(numbers), "seconds": round(seconds, 1)}
    if options.json or interrupted:
        print(json.dumps(found), flush=True)
    if interrupted:
        sys.exit(130)
    if options.keep:
        _write(here / kept, options.seed, found)
        if draw:
            _draw(draw, here, kept)
    return found


def measured_before(file: str, options: argparse.Namespace, kept: str = "results.json") -> dict[str, Any]:
    """What earlier runs of this seed have kept beside the script `file`, for a run that measures a part of it."""
    path = Path(file).with_name(kept)
    if options.smoke or not path.exists():
        return {}
    before = json.loads(path.read_text()).get(str(options.seed), {})
    numbers = {key: value for key, value in before.items() if key not in ("seed", "seconds")}
    return numbers | {"seconds_before": before["seconds"]} if "seconds" in before else numbers


def progress(items: Iterable[T], text: str, total: int | None = None) -> Iterable[T]:
    """`items`, with a progress bar where tqdm is installed and a person is looking."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return items
    return tqdm(items, desc=text, total=total, disable=None, leave=False)


def rounded(value: Any) -> Any:
    """Plain Python numbers of four digits; NaN and infinities as None, so that the line is JSON."""
    if isinstance(value, dict):
        return {str(k): rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v) for v in value]
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if hasattr(value, "shape") and value.shape:
        return rounded(value.tolist())
    value = float(value)
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _write(path: Path, seed: int, found: dict[str, Any]) -> None:
    known = json.loads(path.read_text()) if path.exists() else {}
    known[str(seed)] = found
    fresh = path.with_suffix(".tmp")
    fresh.write_text(_lists_on_one_line(json.dumps(dict(sorted(known.items(), key=lambda kv: int(kv[0]))), indent=1)))
    fresh.replace(path)


def _lists_on_one_line(text: str) -> str:
    """Indented JSON, with each list of numbers (a curve) on a line of its own instead of a line for each number."""
    return re.sub(r"\[[^\[\]{}\"]+\]", lambda found: "[" + " ".join(found[0][1:-1].split()) + "]", text) + "\n"


def _draw(draw: Callable[[dict[str, Any]], Any], here: Path, kept: str) -> None:
    from experiments import _figures  # matplotlib is needed for pictures alone

    _figures.save(draw(json.loads((here / kept).read_text())), here, colours=128)


def _keep_compiled_code() -> str:
    """JAX's persistent compilation cache: on problems this small, compiling is most of the time."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or os.path.join(home, "hypergrad", "jax")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError:
        return f"Compiled code is not kept: {folder} cannot be made."
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # a hundred small programs take seconds
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    return f"Compiled code is kept in {folder} for the next run."


def _natural(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"must be a whole number between 0 and {2**32 - 1}, found {text}")
    return value
