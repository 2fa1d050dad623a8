"""The same call made again goes on where the run was, to the bit, or says why it cannot."""

from __future__ import annotations

import errno
import os
import pickle
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from experiments.reliability.damage import damage
from hypergrad import domains
from hypergrad.outer import CheckpointError, TuneStatus
from hypergrad.outer._config import KEYS, fingerprint, program
from tests.outer._controllers import backtracking
from tests.outer._ridge import TRAIN, VALID, counted, ridge
from tests.reliability._runs import SOLVERS, assert_same, at, bits, interrupt, run


@pytest.fixture(scope="module")
def whole():
    """A run that nothing ever stopped."""
    return run()


@pytest.fixture(scope="module")
def halfway(tmp_path_factory):
    """A folder whose run was interrupted after step 5 of 12; copy it."""
    folder = tmp_path_factory.mktemp("runs") / "halfway"
    assert run(folder, callbacks=at(5, interrupt)).status is TuneStatus.INTERRUPTED
    return folder


@pytest.fixture
def folder(halfway, tmp_path):
    shutil.copytree(halfway, tmp_path / "run")
    return tmp_path / "run"


def steps(folder):
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("step-*"))


@pytest.mark.parametrize("name", SOLVERS)
def test_a_run_in_pieces_is_the_run_in_one_piece(name, tmp_path):
    class MineError(Exception):
        pass

    def fail():
        raise MineError

    seen = []

    def piece(*callbacks, folder: Path | None = tmp_path):
        log = lambda step, metrics: seen.append((step, metrics["value"], float(metrics["hparams"]["l2"])))
        return run(folder, solver=SOLVERS[name](), every=3, callbacks=[log, *callbacks])

    with pytest.raises(MineError):
        piece(at(4, fail))
    assert steps(tmp_path) == [3, 5]
    assert piece(at(9, interrupt)).status is TuneStatus.INTERRUPTED
    pieces = piece()
    in_pieces, seen[:] = list(seen), []
    assert_same(pieces, piece(folder=None))
    # Callbacks saw every step, in order; those that were cut short saw theirs again.
    assert [step for step, *_ in in_pieces] == [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 9, 9, 10, 11]
    assert sorted(set(in_pieces)) == seen
    assert_same(piece(), pieces)  # and once more, from the end
    assert pieces.history.seconds[0] > 0 and np.all(np.diff(pieces.history.seconds) > 0)


# Without a folder: `resume=` takes what the result holds.


@pytest.mark.parametrize("per_call", [1, 5])
@pytest.mark.parametrize(
    "outer", [lambda: optax.adam(0.3), lambda: backtracking(100.0, judged=True)], ids=["adam", "controller"]
)
def test_a_result_goes_on_in_memory_as_if_it_had_never_ended(outer, per_call):
    options = {"outer": outer(), "steps_per_call": per_call, "every": None}
    expected, first = run(**options), run(**options, steps=5)
    for _ in range(2):  # the first is not changed by what goes on from it
        assert_same(run(**options, resume=first), expected)
    stopped = run(**options, callbacks=at(7, interrupt))
    assert stopped.status is TuneStatus.INTERRUPTED
    again = run(**options, resume=pickle.loads(pickle.dumps(stopped)))
    assert_same(again, expected)
    assert np.all(np.diff(again.history.seconds) >= 0)


@pytest.mark.parametrize("name", SOLVERS)
def test_solver_and_test_data_go_on_in_memory(name):
    same = {"solver": SOLVERS[name](), "test": VALID, "train": TRAIN}
    first = run(**same, steps=4)
    whole = run(**same)
    assert_same(run(**same, resume=first), whole)
    assert whole.test is not None


def test_a_stream_goes_on_in_memory():
    batches = [jax.tree.map(lambda a: a[10 * i : 10 * i + 10], TRAIN) for i in range(3)]
    expected, train = run(train=hg.stream(batches, per_step=2)), hg.stream(batches, per_step=2)
    first = run(train=train, steps=5)
    assert_same(run(train=train, resume=first), expected)
    assert_same(run(train=hg.stream(batches, per_step=2), resume=first), expected)


def test_a_count_that_ended_the_run_begins_anew_and_others_go_on():
    options = {"outer": optax.sgd(0.0), "train": TRAIN, "patience": 3}
    first = run(**options)
    assert first.status is TuneStatus.CONVERGED and len(first.history.value) == 4
    second = run(**options, resume=first)
    assert second.status is TuneStatus.CONVERGED and len(second.history.value) == 7
    short = run(**options, steps=3)
    assert_same(run(**options, resume=short), first)


def test_what_goes_on_takes_data_and_step_size_of_this_call():
    first = run(steps=4, outer=optax.sgd(0.3))
    other = run(steps=6, outer=optax.sgd(0.0), resume=first)
    assert np.array_equal(other.history.value[:4], first.history.value)
    assert other.hparams == first.hparams and other.history.hparams["l2"][4] == other.history.hparams["l2"][5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 5}, r"resume holds 5 steps, and steps=5 counts them as well: write steps=10 for 5 more"),
        ({"outer": optax.sgd(0.1, momentum=0.9)}, r"the run in resume has another outer than this call: its outer"),
        ({"params": jnp.zeros(5)}, r"another solver than this call: its solver\['params'\] is float\d+\[6\], here"),
        ({"hparams": {"l2": jnp.ones(2)}}, r"another hparams than this call: its trial\['l2'\] is float\d+\[\], here"),
        ({"test": VALID}, r"must both have test= or both be without it"),
        ({"resume": 3}, r"resume must be the result of hg\.tune, found int: write resume=result"),
        ({"checkpoint": "folder"}, r"resume and checkpoint both say where the run goes on"),
    ],
)  # fmt: skip
def test_what_cannot_go_on_is_refused_before_anything_is_compiled(change, message, monkeypatch):
    given = {"params": jnp.zeros(6), "hparams": {"l2": 0.01}, "train": TRAIN, "outer": optax.adam(0.3), "steps": 12}
    given |= {"valid": VALID, "domain": domains.log(), "progress": False}
    first = hg.tune(ridge(), **given | {"steps": 5})
    with pytest.raises((ValueError, TypeError), match=message):
        hg.tune(ridge(), **given | {"resume": first} | change)


@pytest.mark.parametrize("every", [1, 5, 100])
def test_the_end_is_saved_whatever_the_interval(every, tmp_path, whole):
    assert_same(run(tmp_path, every=every), whole)
    assert steps(tmp_path) == {1: [10, 11, 12], 5: [5, 10, 12], 100: [12]}[every]


def test_checkpoints_do_not_trace_again(tmp_path):
    solver, traces = counted(ridge())
    run(tmp_path, solver=solver)
    run(tmp_path, solver=solver, steps=14)
    assert len(traces) == 2, "one for each call"


def test_more_steps_go_on_and_fewer_are_refused(folder):
    long = run(folder, steps=15)
    assert_same(long, run(steps=15))
    with pytest.raises(ValueError, match=r"step 15 in .* is beyond steps=3"):
        run(folder, steps=3)


def test_a_run_that_a_callback_stopped_asks_it_again(tmp_path, whole):
    stop = at(6, lambda: True)
    first = run(tmp_path, callbacks=stop)
    assert first.status is TuneStatus.STOPPED
    again = run(tmp_path, callbacks=stop)
    assert_same(again, first)
    assert len(again.history.value) == 7
    assert_same(run(tmp_path), whole)


def test_a_run_that_failed_or_converged_ends_the_same_way_again(tmp_path):
    def spoil(calls, value, grad, status):
        return jnp.where(calls > 3, jnp.nan, value), grad, status

    for _ in range(2):
        with pytest.warns(UserWarning, match="stopped after 2 unusable"):
            failed = run(tmp_path / "a", solver=ridge(spoil), max_failures=2)
        assert failed.status is TuneStatus.FAILED and len(failed.history.value) == 6
    first, second = (run(tmp_path / "b", outer=optax.sgd(0.0), patience=3, train=TRAIN) for _ in range(2))
    assert first.status is TuneStatus.CONVERGED
    assert_same(second, first)


def test_a_run_without_a_usable_step_is_resumed_without_a_best(tmp_path):
    def spoil(calls, value, grad, status):
        return jnp.where(calls < 6, jnp.nan, value), grad, status

    run(tmp_path, solver=ridge(spoil), max_failures=9, callbacks=at(3, interrupt))
    assert_same(run(tmp_path, solver=ridge(spoil), max_failures=9), run(solver=ridge(spoil), max_failures=9))


def constant(scale):
    """Ridge whose program differs in a constant inside a loop alone."""
    table = np.linspace(1, 2, 5) * scale

    def spoil(calls, value, grad, status):
        total = jax.lax.fori_loop(0, 3, lambda i, x: x + jnp.asarray(table)[i], jnp.zeros(()))
        return value + total.astype(value.dtype), grad, status

    return ridge(spoil)


OTHER_X = (TRAIN[0] + 1e-9, TRAIN[1])
CHANGES = {
    "key": {"key": jax.random.key(8)},
    "hparams": {"hparams": {"l2": 0.010001}},
    "train": {"train": hg.minibatches(OTHER_X, 10)},
    "train size": {"train": hg.minibatches(TRAIN, 11)},
    "valid": {"valid": (VALID[0], VALID[1] + 1)},
    "domain": {"domain": domains.positive()},
    "outer": {"outer": optax.adam(0.2)},
    "max_failures": {"max_failures": 6},
    "patience": {"patience": 50},
    "solver": {"solver": ridge(lambda calls, value, grad, status: (2 * value, grad, status))},
    "solver constant": {"solver": constant(1)},
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_configuration_is_refused_by_name(change, folder):
    name = change.split()[0]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("step-*/*")}
    with pytest.raises(ValueError, match="was made with another ") as error:
        run(folder, **CHANGES[change])
    found = str(error.value).split("made with another ")[1].split(":")[0]
    assert [part.split()[0] for part in found.split(", ")] == [name]
    assert f"allow_changed=('{name}',)" in str(error.value)
    if name == "max_failures":
        assert "max_failures (5 → 6)" in str(error.value)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("step-*/*")} == before


def test_what_is_allowed_to_change_may(folder, whole):
    result = run(folder, outer=optax.adam(0.2), hparams={"l2": 5.0}, allow_changed=("outer", "hparams"))
    assert result.status is TuneStatus.FINISHED
    np.testing.assert_array_equal(result.history.value[:6], whole.history.value[:6])
    assert result.hparams["l2"] != whole.hparams["l2"]
    with pytest.raises(
        ValueError, match=r"allow_changed has no 'trian', did you mean 'train'.*the names are hypergrad"
    ):
        run(folder, allow_changed="trian")


def test_other_versions_and_devices_are_named(folder, monkeypatch):
    monkeypatch.setattr(jax, "__version__", "99.0")
    with pytest.raises(ValueError, match=r"another jax \(.* → 99.0\): pass"):
        run(folder)
    assert run(folder, allow_changed="jax").status is TuneStatus.FINISHED


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype")
def test_x64_toggled_between_save_and_load_is_refused(folder, x64):
    jax.config.update("jax_enable_x64", not x64)
    try:
        states = ("on", "off") if x64 else ("off", "on")
        with pytest.raises(ValueError, match=r"another x64 \({} → {}\)".format(*states)):
            run(folder)
        # Nor can it be allowed: the arrays would lose half their digits without a word.
        with pytest.raises(ValueError, match=r"float(32|64).*jax_enable_x64 differs\?"):
            run(folder, allow_changed=KEYS)
    finally:
        jax.config.update("jax_enable_x64", x64)


def test_programs_have_one_fingerprint_in_every_process():
    """Neither addresses nor the order of hashes get in, and constants inside loops do."""
    code = (
        "import jax, numpy as np, jax.numpy as jnp; from hypergrad.outer._config import program\n"
        "body = lambda s: lambda i, y: jax.nn.relu(y) + jnp.asarray(s * np.ones(3))\n"
        "f = lambda s: jax.value_and_grad(lambda x: jax.lax.fori_loop(0, 3, body(s), x).sum())\n"
        "print(*[program(jax.jit(f(s)).trace(np.ones(3))) for s in (1, 1, 2)])\n"
    )
    seen = set()
    for seed in "01":
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        first, second, third = done.stdout.split()
        assert first == second != third
        seen.add(first)
    assert len(seen) == 1


def test_fingerprints_tell_apart_what_numbers_alone_do_not():
    trees = [
        {"a": np.zeros(2), "b": np.zeros(2)},
        {"a": np.zeros(4), "b": np.zeros(0)},
        {"a": np.zeros((2, 1)), "b": np.zeros(2)},
        {"a": np.zeros(2, np.float32), "b": np.zeros(2)},
        {"a": -np.zeros(2), "b": np.zeros(2)},
        {"a": np.zeros(2), "c": np.zeros(2)},
        jax.random.key(0),
        jax.random.key_data(jax.random.key(0)),
        None,
        hg.minibatches(np.zeros(4), 2),
        hg.minibatches(np.zeros(4), 3),
        np.zeros(4),
    ]
    assert len({fingerprint(tree) for tree in trees}) == len(trees)
    assert fingerprint(jnp.ones(3)) == fingerprint(np.ones(3, jnp.ones(3).dtype))
    assert program(jax.jit(jnp.sin).trace(1.0)) != program(jax.jit(jnp.cos).trace(1.0))


def test_a_damaged_checkpoint_costs_one_interval_and_is_cleared_away(folder, whole):
    assert steps(folder) == [4, 6]
    file = damage(folder, f"step-{6:012d}", "flip", np.random.default_rng(0))
    with pytest.warns(UserWarning, match="is not what was written.*step 4 is used") as caught:
        result = run(folder, every=3)
    assert file in str(caught[0].message) and len(caught) == 1
    assert_same(result, whole)
    assert steps(folder) == [6, 9, 12]


def test_where_all_are_damaged_a_run_does_not_begin_anew(folder):
    rng = np.random.default_rng(0)
    for step in (4, 6):
        damage(folder, f"step-{step:012d}", "truncate", rng)
    with pytest.raises(CheckpointError, match="none of the 2"):
        run(folder)
    assert steps(folder) == [4, 6]


def test_half_written_checkpoints_of_the_dead_are_cleared_and_others_left(folder, whole):
    (folder / "tmp-7-1").mkdir()  # process 1 is always alive
    (folder / "tmp-7-1" / "leaves.npz").write_text("half")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (folder / f"tmp-7-{dead.pid}").mkdir()
    assert_same(run(folder), whole)
    assert {path.name for path in folder.glob("tmp-*")} == {"tmp-7-1"}


def test_two_runs_in_one_folder_are_refused(tmp_path):
    refused = []

    def second(step, metrics):
        if step == 1:
            with pytest.raises(CheckpointError, match="this very process is writing to the checkpoint folder"):
                run(tmp_path)
            refused.append(step)

    first = run(tmp_path, callbacks=second)
    assert refused == [1] and first.status is TuneStatus.FINISHED
    assert run(tmp_path).status is TuneStatus.FINISHED


@pytest.mark.parametrize("which", ["a file", "under a file", "no folder can be made", "read-only"])
def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_is_compiled(which, tmp_path):
    solver, traces = counted(ridge())
    (tmp_path / "file").write_text("")
    with tempfile.TemporaryDirectory(dir="/tmp") as open_to_all:
        os.chmod(open_to_all, 0o755)
        folder = {
            "a file": tmp_path / "file",
            "under a file": tmp_path / "file" / "run",
            "no folder can be made": Path("/proc/hypergrad"),
            "read-only": Path(open_to_all) / "run",
        }[which]
        user = os.geteuid()
        if which == "read-only":
            folder.mkdir(mode=0o555)
            if user == 0:
                os.seteuid(65534)  # to root, no folder is read-only
        try:
            with pytest.raises(ValueError, match=r"tune: checkpoint: the folder .* cannot be written to") as error:
                run(folder, solver=solver)
        finally:
            os.seteuid(user)
        assert str(folder) in str(error.value)
        assert not traces and (which != "read-only" or not list(folder.iterdir()))
    with pytest.raises(TypeError, match="tune: checkpoint: the folder must be a path"):
        run(3)
    with pytest.raises(ValueError, match="tune: every must be at least 1"):
        run(tmp_path, every=0)


def test_a_full_disk_is_a_warning_and_the_run_goes_on(tmp_path, whole):
    """RLIMIT_FSIZE makes every write beyond 100 bytes of a file fail, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    seen = {}

    def disk(step, metrics):
        if step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        if step == 9:
            seen["steps"] = steps(tmp_path)
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    try:
        with pytest.warns(UserWarning, match="the checkpoint of step 6 could not be written") as caught:
            result = run(tmp_path, every=2, callbacks=disk)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(caught) == 1 and os.strerror(errno.EFBIG) in str(caught[0].message)
    assert "that of step 4 stays the last" in str(caught[0].message)
    assert seen["steps"] == [2, 4] and steps(tmp_path) == [4, 10, 12]
    assert_same(result, whole)


@pytest.mark.parametrize("name", ["write", "fsync", "rename"])
def test_a_run_survives_every_failing_call(name, folder, whole, monkeypatch):
    """All saves of a run fail: it ends as if it had kept none, and the checkpoint before it stays."""

    def fail(*args, **kwargs):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        start = lambda step, metrics: patch.setattr(os, name, fail)
        with pytest.warns(UserWarning, match=os.strerror(errno.EIO)):
            result = run(folder, every=1, callbacks=start)
    assert_same(result, whole)
    assert steps(folder) == [4, 6]
    assert_same(run(folder), whole)


def test_results_are_compared_to_the_bit(whole):
    """The comparison that the others rest on."""
    moved = whole._replace(params=whole.params.at[0].set(np.nextafter(whole.params[0], np.inf)))
    assert bits(moved) != bits(whole) == bits(run())
    assert bits(run(key=jax.random.key(8))) != bits(whole)
