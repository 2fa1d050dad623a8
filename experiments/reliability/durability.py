"""Nothing is lost: the same bits in every process, after SIGKILL at any instant, after damage, after Ctrl-C.

    python experiments/reliability/durability.py                # P8, P9, P10, P15 in full: about 15 minutes
    python experiments/reliability/durability.py --smoke --json # each of them in small
    python experiments/reliability/durability.py --only P9
    python experiments/reliability/durability.py --overhead     # what a checkpoint costs

Every promise is a function `(seed, smoke) -> (figure, bar, met)`. Processes are real, and so are the signals; to start
400 of them, one process imports everything and forks before JAX has started a thread.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2])]  # a bare clone works as well as an installation
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

import hypergrad as hg  # noqa: E402
from experiments._common import progress  # noqa: E402
from experiments.reliability.damage import KINDS, detected, format_refused, like  # noqa: E402

STEPS = 40
Answer = tuple[str, str, bool]


def run(
    folder: Path | None, *, steps: int = STEPS, every: int = 1, log: int | None = None, **options: Any
) -> hg.Result:
    """Ridge strengths of 8 features on minibatches, by unrolled training: state, key and history all matter."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 8)).astype(np.float32)
    y = (x @ rng.normal(size=8) + rng.normal(size=60)).astype(np.float32)

    def loss(w: Any, h: Any, batch: Any) -> Any:
        return jnp.mean((batch[0] @ w - batch[1]) ** 2) + jnp.sum(jnp.exp(h["log_l2"]) * w**2)

    problem = hg.Problem(loss, lambda w, h, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2))
    solver = hg.unrolled(problem, inner=hg.inner.gradient(optax.sgd(0.05), steps=5))
    given: dict[str, Any] = {"outer": optax.adam(0.1), "hparams": {"log_l2": jnp.full(8, -2.0)}, **options}
    write = lambda step, metrics: os.write(log, f"{step} {metrics['value']!r}\n".encode()) and None if log else None
    return hg.tune(
        solver, jnp.zeros(8), given.pop("hparams"), hg.minibatches((x[:40], y[:40]), 10), (x[40:], y[40:]), steps=steps,
        key=jax.random.key(3), checkpoint=folder, every=every, callbacks=write, progress=False, **given,
    )  # fmt: skip


def digest(result: hg.Result) -> str:
    """SHA-256 of everything in a result but wall times."""
    history = result.history._replace(seconds=np.zeros(0))
    sha256 = hashlib.sha256()
    for leaf in jax.tree.leaves((result.hparams, result.params, tuple(result.best), tuple(history), result.state)):
        sha256.update(np.asarray(leaf).tobytes())
    return sha256.hexdigest()


def child(folder: str, steps: int, every: int) -> None:
    """One run, in a process of its own. Leaves a line per step in `log`, and its result in `result.json`."""
    _keep_compiled_code()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    log = os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o666)
    result = run(Path(folder), steps=steps, every=every, log=log)
    found = {"digest": digest(result), "status": result.status.name, "steps": len(result.history.value)}
    found["best"] = result.best.value
    Path(f"{folder}.json").write_text(json.dumps(found))


def nursery() -> None:
    """Fork a child for every line of input `folder steps every`; answer with its number, then with how it ended."""
    warnings.filterwarnings("ignore", message="os.fork")
    for line in sys.stdin:
        folder, steps, every = json.loads(line)
        number = os.fork()
        if number == 0:
            status = 1
            try:
                child(folder, steps, every)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        print(number, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]), flush=True)


class Nursery:
    """The other end of `nursery`."""

    def __enter__(self) -> Nursery:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--nursery"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *error: Any) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def start(self, folder: Path, steps: int = STEPS, every: int = 1) -> int:
        assert self.process.stdin and self.process.stdout
        for end in (".log", ".json"):
            Path(f"{folder}{end}").unlink(missing_ok=True)
        self.process.stdin.write(json.dumps([str(folder), steps, every]) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self) -> int:
        assert self.process.stdout
        return int(self.process.stdout.readline())


def p8(seed: int, smoke: bool) -> Answer:
    """Same seed, device and versions give the same bits, in processes with other hash seeds and memory layouts."""
    count, found = (2 if smoke else 20), set()
    with tempfile.TemporaryDirectory() as home:
        for i in progress(range(count), "P8 processes"):
            command = [sys.executable, __file__, "--child", f"{home}/{i}"]
            subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": str(seed + i)}, check=True)
            found.add(json.loads(Path(f"{home}/{i}.json").read_text())["digest"])
    return f"{len(found)} result in {count} processes", f"1 in {count}", len(found) == 1


def p9(seed: int, smoke: bool) -> Answer:
    """SIGKILL at random instants: each resumes, bit for bit, and at most one interval (here one step) is lost.

    After each kill the newest whole checkpoint is compared, leaf by leaf, with that of the same step of a run that was
    never stopped; the next process goes on from there, until it is killed or ends; then the results are compared.
    """
    rng = np.random.default_rng(seed)
    kills, inside, lost, failures, finished = 0, 0, 0, 0, 0
    wanted, needed, steps = (4, 0, 6) if smoke else (200, 50, STEPS)
    with tempfile.TemporaryDirectory() as home, Nursery() as nursery:
        whole = Path(home) / "whole"
        truth, expected = _every_step(nursery, whole, steps)
        began = time.perf_counter()
        nursery.start(Path(home) / "timed", steps)
        nursery.wait()
        length = time.perf_counter() - began
        with contextlib.suppress(KeyboardInterrupt):  # what was counted so far is reported
            for trial in progress(range(10 * wanted), "P9 kills", 10 * wanted):
                folder = Path(home) / f"chain{finished}"
                number = nursery.start(folder, steps)
                if trial % 2:  # after the first step, where most of the time goes into saving; else any time at all
                    _wait_for(folder, number)
                time.sleep(rng.uniform(0, length / 2 if trial % 2 else length))
                with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
                    os.kill(number, signal.SIGKILL)
                status = nursery.wait()
                if status == -signal.SIGKILL:
                    kills += 1
                    inside += any(folder.glob("tmp-*"))
                    done = _logged(folder)
                    step, leaves = _newest(folder)
                    failures += leaves != truth.get(step, {})
                    lost = max(lost, done - step)
                else:
                    failures += status != 0 or json.loads(Path(f"{folder}.json").read_text())["digest"] != expected
                    finished += 1
                if kills >= wanted and inside >= needed:
                    break
        nursery.start(folder := Path(home) / f"chain{finished}", steps)
        failures += nursery.wait() != 0 or json.loads(Path(f"{folder}.json").read_text())["digest"] != expected
    figure = f"{kills - failures}/{kills} resume to the bit, {inside} killed inside a save, at most {lost} step lost"
    met = failures == 0 and lost <= 1 and kills >= wanted and inside >= needed
    return figure, f"{wanted}/{wanted}, {needed} inside, 1 lost", met


def p10(seed: int, smoke: bool) -> Answer:
    """Damage is detected, the file named, the newest whole checkpoint used; another format or call is refused by name.

    1,000 deliberate damages of ten kinds, 100 each of another format and of another configuration; 10,000 random ones.
    """
    rng = np.random.default_rng(seed)
    counts = (30, 4, 60) if smoke else (1000, 100, 10_000)
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "run"
        run(folder, every=10, steps=30)
        shape = like(folder)
        damaged = sum(detected(folder, shape, KINDS[i % len(KINDS)], rng) for i in progress(range(counts[0]), "P10"))
        refused = sum(format_refused(folder, shape, rng) + _call_refused(folder, rng) for _ in range(counts[1]))
        fuzzed = sum(detected(folder, shape, str(rng.choice(KINDS)), rng) for _ in progress(range(counts[2]), "fuzz"))
    bar = f"{counts[0]}, {2 * counts[1]}, {counts[2]}"
    figure = f"{damaged} damages, {refused} refusals, {fuzzed} corruptions"
    return figure, bar, (damaged, refused, fuzzed) == (counts[0], 2 * counts[1], counts[2])


def p15(seed: int, smoke: bool) -> Answer:
    """Ctrl-C and SIGTERM: the process ends by itself within 2 s, one step at most after the signal, all of it saved.

    In small, the time is not judged: two processes on a busy machine say nothing.
    """
    rng = np.random.default_rng(seed)
    slowest, wrong, count = 0.0, [], (2 if smoke else 40)
    with tempfile.TemporaryDirectory() as home, Nursery() as nursery:
        for trial in progress(range(count), "P15 signals"):
            folder = Path(home) / str(trial)
            number = nursery.start(folder, steps=10**6, every=10)
            _wait_for(folder, number)
            time.sleep(rng.uniform(0, 0.5))
            began = time.perf_counter()
            os.kill(number, (signal.SIGINT, signal.SIGTERM)[trial % 2])
            before = _logged(folder)  # read now: between a look before and the signal any number of steps may pass
            status = nursery.wait()
            slowest = max(slowest, time.perf_counter() - began)
            found = json.loads(Path(f"{folder}.json").read_text()) if status == 0 else {"status": f"exit {status}"}
            values = [float(line.split()[1]) for line in Path(f"{folder}.log").read_text().splitlines()]
            saved = hg.outer.load(folder, like(folder)).step
            # A step that was done when the signal came may have no line: its callback was cut off.
            broken = [
                what
                for what, holds in {
                    f"ended as {found['status']}": found["status"] == "INTERRUPTED",
                    f"{saved} saved": saved == found.get("steps"),
                    f"{len(values)} logged": found.get("steps", -1) - len(values) in (0, 1),
                    f"{len(values) - before} steps after the signal": len(values) - before <= 2,
                    "the best is not the best logged": found.get("best", np.inf) <= min(values),
                }.items()
                if not holds
            ]
            wrong += [f"trial {trial}: {', '.join(broken)}"] if broken else []
    return (
        "; ".join([f"{count - len(wrong)}/{count}, slowest {slowest:.2f} s", *wrong]),
        f"{count}/{count}, 2 s",
        not wrong and (smoke or slowest <= 2),
    )


def overhead(seed: int, smoke: bool) -> dict[str, float]:
    """Milliseconds that a step takes without checkpoints and with one after each, and the share of it that is waiting
    for the disk (measured with a sync that does nothing)."""
    steps = 30 if smoke else 300
    real, found = os.fsync, {}
    for name, every in (("without", None), ("every step", 1), ("every step, no sync", 1), ("every 10 steps", 10)):
        os.fsync = (lambda fd: None) if "sync" in name else real
        with tempfile.TemporaryDirectory() as home:
            history = run(Path(home) / "run" if every else None, steps=steps, every=every or 1).history
        gaps = np.diff(history.seconds[5:])
        found[f"{name}: ms a step"] = 1e3 * (statistics.median(gaps) if every != 10 else float(np.mean(gaps)))
    os.fsync = real
    return found


PROMISES = {"P8": p8, "P9": p9, "P10": p10, "P15": p15}


def _every_step(nursery: Nursery, folder: Path, steps: int) -> tuple[dict[int, dict[str, str]], str]:
    """Leaf hashes after every step of a run that nothing stops, and the digest of its result."""
    truth: dict[int, dict[str, str]] = {0: {}}
    for step in range(1, steps + 1):  # a run of n steps ends in the checkpoint of step n, and the next goes on there
        nursery.start(folder, steps=step)
        if nursery.wait() != 0:
            raise RuntimeError("a run that nobody disturbed failed")
        truth[step] = _newest(folder)[1]
    whole = folder.with_name("in one piece")
    nursery.start(whole, steps)
    nursery.wait()
    if _newest(whole)[1] != truth[steps]:
        raise RuntimeError("a run of one step at a time ended elsewhere than a run in one piece")
    return truth, json.loads(Path(f"{whole}.json").read_text())["digest"]


def _newest(folder: Path) -> tuple[int, dict[str, str]]:
    """Step and leaf hashes of the newest checkpoint, but of the table that holds wall times."""
    found = sorted(folder.glob("step-*"))
    if not found:
        return 0, {}
    hg.outer.load(folder, like(folder))  # raises, or warns, if it is not whole
    manifest = json.loads((found[-1] / "manifest.json").read_text())["manifest"]
    leaves = {leaf["path"]: leaf["sha256"] for leaf in manifest["leaves"] if leaf["path"] != "['rows']['scalars']"}
    return manifest["step"], leaves


def _call_refused(folder: Path, rng: np.random.Generator) -> bool:
    """The same call but for one argument."""
    name, options = (
        ("hparams", {"hparams": {"log_l2": jnp.asarray(rng.normal(size=8), jnp.float32)}}),
        ("outer", {"outer": optax.adam(float(rng.uniform(0.2, 1)))}),
        ("max_failures", {"max_failures": int(rng.integers(6, 100))}),
        ("patience", {"patience": int(rng.integers(1, 100))}),
        ("domain", {"domain": {"log_l2": hg.domains.interval(-9, float(rng.uniform(0, 9)))}}),
    )[int(rng.integers(5))]
    try:
        run(folder, every=10, steps=30, **options)
    except ValueError as error:
        return f"made with another {name}" in str(error)
    return False


def _logged(folder: Path) -> int:
    """Steps whose callbacks ran, counted from the start of the run."""
    file = Path(f"{folder}.log")
    lines = file.read_text().splitlines() if file.exists() else []
    return int(lines[-1].split()[0]) + 1 if lines else 0


def _wait_for(folder: Path, number: int) -> None:
    """Until the run has taken a step, or ended: one that was killed after its last step takes none when it resumes."""
    log, limit = Path(f"{folder}.log"), time.monotonic() + 600
    while _alive(number) and not (log.exists() and log.stat().st_size):
        if time.monotonic() > limit:
            raise RuntimeError("a run took no step within ten minutes")
        time.sleep(0.002)


def _alive(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return True


def _keep_compiled_code() -> None:
    """In a folder that lasts as long as the machine: what is started 400 times must not compile 400 times."""
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(Path(tempfile.gettempdir()) / "hypergrad-durability")
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--seed", type=int, default=0, help="of the instants and of the damage")
    parser.add_argument("--smoke", action="store_true", help="each promise in small")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--only", default="", help="comma-separated promises, such as P9,P15")
    parser.add_argument("--overhead", action="store_true", help="what a checkpoint costs, instead")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--nursery", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.nursery or options.child:
        nursery() if options.nursery else child(options.child, STEPS, 1)
        return {}
    if options.overhead:
        found = {name: round(value, 2) for name, value in overhead(options.seed, options.smoke).items()}
        print(json.dumps(found))
        return found
    chosen = [name for name in options.only.split(",") if name] or list(PROMISES)
    if unknown := [name for name in chosen if name not in PROMISES]:
        parser.error(f"argument --only: unknown {', '.join(unknown)}; the promises are {', '.join(PROMISES)}")
    _keep_compiled_code()
    found = {}
    try:
        for name in chosen:
            began = time.perf_counter()
            figure, bar, met = found[name] = PROMISES[name](options.seed, options.smoke)
            seconds = time.perf_counter() - began
            print(f"{name:4} {'met    ' if met else 'NOT MET'} {figure}   (bar: {bar}; {seconds:.0f} s)", flush=True)
    except KeyboardInterrupt:
        print("Interrupted; what was measured is above.", file=sys.stderr)
    if options.json:
        print(json.dumps(found), flush=True)
    return found


if __name__ == "__main__":
    main()
