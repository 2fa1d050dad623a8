"""The command line of the demo: arguments, the compilation cache, printing."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

import jax

import hypergrad as hg
from hypergrad._checks import install
from hypergrad._demo import cleaning, images, l2
from hypergrad._demo.methods import METHODS
from hypergrad._demo.outcome import aligned

TASKS = {"images": images, "cleaning": cleaning, "l2": l2}
ABOUT = {
    "images": "the pixels of ten images, one for each handwritten digit, are the hyperparameters: learned so\n"
    "that a model trained on these ten alone reads 1,300 real ones; then tested on 497 others.",
    "cleaning": "600 handwritten digits, half of the labels wrong: one weight per example,\n"
    "tuned by hypergradient so that training on the weighted examples does well on 600 others.",
    "l2": "190 patients, 30 measurements each: one regularization strength per measurement,\n"
    "tuned by hypergradient on 190 others, against grid and random search of equal cost.",
}
SUFFIXES = (".png", ".pdf", ".svg")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and return the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    if missing := _missing():
        print(f"python -m hypergrad needs {' and '.join(missing)}: {install('demo')}", file=sys.stderr)
        return 1
    _check_folder(parser, args.out)
    try:
        run(args)
    except KeyboardInterrupt:
        print("\nInterrupted before there was anything to show.", file=sys.stderr)
        return 130
    return 0


def run(args: argparse.Namespace) -> None:
    """Print what happens, as it happens. Ctrl-C while tuning ends the tuning, and the result so far is reported."""
    began = time.perf_counter()
    task = TASKS[args.task]
    method = args.method or task.DEFAULT_METHOD
    print(f"hypergrad {hg.__version__}: {ABOUT[args.task]}")
    print(f"Method {method}: {METHODS[method][0]}.")
    print(_keep_compiled_code(), flush=True)
    outcome = task.run(method, args.seed, args.steps)
    print("\n" + aligned(outcome.table) + "\n")
    print("\n".join(textwrap.fill(note, 100) for note in outcome.notes), flush=True)
    outcome.draw(args.out)
    seconds = time.perf_counter() - began
    print(f"Picture: {Path(args.out).resolve()}\n{seconds:.1f} s in all.", flush=True)
    if args.json:
        print(
            json.dumps(
                {
                    "task": args.task,
                    "method": method,
                    "seed": args.seed,
                    **outcome.numbers,
                    "seconds": round(seconds, 2),
                    "picture": str(Path(args.out).resolve()),
                }
            ),
            flush=True,
        )


def _parser() -> argparse.ArgumentParser:
    methods = "\n".join(f"  {name:<11}{text}" for name, (text, _) in METHODS.items())
    parser = argparse.ArgumentParser(
        prog="python -m hypergrad",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        description="Hyperparameters tuned by gradient on real data.",
        epilog="tasks:\n"
        + "\n".join(f"  {name:<11}{text.replace(chr(10), chr(10) + ' ' * 13)}" for name, text in ABOUT.items())
        + f"\n\nmethods:\n{methods}",
    )
    parser.add_argument("--task", choices=TASKS, default="images", help="what to tune (default: %(default)s)")
    parser.add_argument(
        "--method", choices=METHODS, help=f"how to get the hypergradient (default: {_defaults('DEFAULT_METHOD')})"
    )
    parser.add_argument("--steps", type=_positive, metavar="N", help=f"outer steps (default: {_defaults('STEPS')})")
    parser.add_argument(
        "--seed",
        type=_natural,
        default=0,
        metavar="N",
        help="of the split and of the wrong labels (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=_picture,
        default="hypergrad-demo.png",
        metavar="FILE",
        help="where the picture goes: .png, .pdf or .svg (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the numbers as one JSON object on the last line")
    return parser


def _defaults(name: str) -> str:
    return ", ".join(f"{getattr(task, name)} for {word}" for word, task in TASKS.items())


def _natural(text: str) -> int:
    value = int(text)  # argparse turns ValueError into a usage message
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"must be between 0 and {2**32 - 1}, found {text}")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, found {text}")
    return value


def _picture(text: str) -> str:
    if not text.lower().endswith(SUFFIXES):
        raise argparse.ArgumentTypeError(f"must end in {', '.join(SUFFIXES)}, found {text!r}")
    return text


def _check_folder(parser: argparse.ArgumentParser, out: str) -> None:
    """Check now whether the picture can be written, instead of failing after a minute."""
    folder = Path(out).resolve().parent
    if not folder.is_dir():
        parser.error(f"argument --out: there is no folder {folder}")
    if not os.access(folder, os.W_OK) or Path(out).is_dir():
        parser.error(f"argument --out: {out} cannot be written")


def _missing() -> list[str]:
    packages = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}
    return [name for module, name in packages.items() if importlib.util.find_spec(module) is None]


def _keep_compiled_code() -> str:
    """Switch on JAX's persistent compilation cache: on problems this small, compiling is most of the time."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(home) / "hypergrad" / "jax"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        return f"Compiled code is not kept: {folder} cannot be written."
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    return f"Compiled code is kept in {folder} for the next run."
