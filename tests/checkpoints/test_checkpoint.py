"""What is on disk is what was saved, or it is refused: round trips, damage, failing disks, other people's hands."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import pickle
import shutil
import tempfile
import warnings
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from experiments.reliability.damage import KINDS, damage
from hypergrad import outer
from hypergrad.checkpoints import checkpoint
from hypergrad.outer import CheckpointError

TREE = {
    "w": np.linspace(-1, 1, 7, dtype=np.float32),
    "half": jnp.arange(3, dtype=jnp.bfloat16) / 3,
    "small": jnp.full(2, 0.25, jnp.float8_e4m3fn),
    "keys": jax.random.split(jax.random.key(5), 2),
    "old key": jax.random.PRNGKey(1),
    "nested": (None, [np.float64(np.pi), 3, 0.1, True], ()),
    "empty": np.zeros((0, 2)),
    "odd": [jnp.asarray([np.nan, -0.0, np.inf], jnp.float32), np.asfortranarray(np.arange(6).reshape(2, 3))],
}


def other(tree, shift=1):
    """Another tree of the same kind."""

    def change(x):
        if isinstance(x, bool):
            return not x
        return x if hasattr(x, "dtype") and "key" in str(x.dtype) else x + shift

    return jax.tree.map(change, tree)


def bits(tree):
    leaves = [
        jax.random.key_data(x) if hasattr(x, "dtype") and "key" in str(x.dtype) else x for x in jax.tree.leaves(tree)
    ]
    return [(type(x).__name__, str(np.asarray(x).dtype), np.shape(x), np.asarray(x).tobytes()) for x in leaves]


def assert_same_bits(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert bits(found) == bits(expected)


@pytest.fixture(scope="module")
def good():
    """A folder with the checkpoints of steps 1 and 2; copy it."""
    with tempfile.TemporaryDirectory() as folder:
        outer.save(folder, TREE, step=1)
        outer.save(folder, other(TREE), step=2)
        yield Path(folder)


def read_quietly(folder, like=TREE):
    """What `load` returns, and the text of its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = outer.load(folder, like)
    return loaded, " ".join(str(w.message) for w in caught)


def test_load_returns_the_bits_and_types_that_save_was_given(tmp_path):
    path = outer.save(tmp_path, TREE, step=12)
    assert path == tmp_path / "step-000000000012"
    loaded = outer.load(tmp_path, TREE)
    assert loaded.step == 12
    assert_same_bits(loaded.tree, TREE)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, jax.Array) else x, TREE)
    assert_same_bits(outer.load(tmp_path, shapes).tree, TREE)


def test_saving_what_was_loaded_writes_the_same_bytes(tmp_path):
    first = outer.save(tmp_path / "a", TREE, step=3)
    second = outer.save(tmp_path / "b", outer.load(tmp_path / "a", TREE).tree, step=3)
    for name in ("leaves.npz", "manifest.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_numpy_alone_reads_the_arrays(tmp_path):
    path = outer.save(tmp_path, {"a": jnp.arange(3.0), "b": 7}, step=0)
    with np.load(path / "leaves.npz", allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["0000"], [0, 1, 2])
    manifest = json.loads((path / "manifest.json").read_text())["manifest"]
    assert [leaf["path"] for leaf in manifest["leaves"]] == ["['a']", "['b']"]
    assert manifest["leaves"][0]["sha256"] == hashlib.sha256(np.asarray(jnp.arange(3.0)).tobytes()).hexdigest()


def test_three_checkpoints_stay(tmp_path):
    for step in range(6):
        outer.save(tmp_path, {"step": step}, step=step)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == [f"step-{s:012d}" for s in (3, 4, 5)]
    outer.save(tmp_path, {"step": 6}, step=6, keep=1)
    assert [p.name for p in tmp_path.glob("step-*")] == [f"step-{6:012d}"]
    assert outer.load(tmp_path, {"step": 0}) == (6, {"step": 6})


@pytest.mark.parametrize(
    ("like", "words"),
    [
        (TREE | {"w": np.zeros(8, np.float32)}, ["['w'] has shape [7], expected [8]"]),
        (TREE | {"w": np.zeros(7)}, ["['w'] has dtype float32, expected float64 (jax_enable_x64 differs?)"]),
        (TREE | {"half": jnp.zeros(3, jnp.float16)}, ["['half'] has dtype bfloat16, expected float16"]),
        (
            TREE | {"keys": jax.random.split(jax.random.key(0, impl="rbg"), 2)},
            ["['keys'] has dtype key<fry>", "key<rbg>"],
        ),
        (TREE | {"v": 1}, ["holds no ['v']"]),
        ({k: v for k, v in TREE.items() if k != "empty"}, ["holds ['empty'] as well"]),
        (TREE["w"], ["holds no the tree itself"]),
    ],
)
def test_another_tree_is_refused_by_its_first_path(good, like, words):
    with pytest.raises(ValueError, match="it was saved from another tree") as error:
        outer.load(good, like)
    for word in words:
        assert word in str(error.value)


def test_an_empty_folder_holds_no_checkpoint(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match="no checkpoint in"):
            outer.load(folder, TREE)
    with pytest.raises(TypeError, match="folder must be a path"):
        outer.load(3, TREE)  # pyright: ignore[reportArgumentType]
    for options in ({"step": -1}, {"step": 1.5}, {"step": 1, "keep": 0}):
        with pytest.raises((ValueError, TypeError), match=r"save: (step|keep) must be"):
            outer.save(tmp_path, TREE, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_named_and_the_checkpoint_before_it_is_used(good, tmp_path, kind):
    rng = np.random.default_rng(KINDS.index(kind))
    for trial in range(40 if kind in ("flip", "overwrite") else 10):
        folder = tmp_path / str(trial)
        shutil.copytree(good, folder)
        file = damage(folder, "step-000000000002", kind, rng)
        loaded, warned = read_quietly(folder)
        assert loaded.step == 1 and bits(loaded.tree) == bits(TREE)
        assert file in warned and "step 1 is used" in warned


def test_a_damaged_leaf_is_named(good, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(good, folder)
    path = folder / "step-000000000002" / "leaves.npz"
    data = bytearray(path.read_bytes())
    place = data.find(np.asarray(other(TREE)["w"]).tobytes())
    data[place + 3] ^= 16
    path.write_bytes(data)
    assert "leaves.npz is not what was written (leaf ['w'])" in read_quietly(folder)[1]


def test_where_everything_is_damaged_nothing_is_returned_or_deleted(good, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(good, folder)
    for step in (1, 2):
        with open(folder / f"step-{step:012d}" / "leaves.npz", "r+b") as file:
            file.truncate(100)
    before = sorted(folder.rglob("*"))
    with pytest.raises(CheckpointError, match=r"none of the 2 .*leaves.npz.*leaves.npz.*Nothing was deleted"):
        outer.load(folder, TREE)
    assert sorted(folder.rglob("*")) == before


def test_a_save_deletes_nothing_but_older_checkpoints(good, tmp_path):
    """Whatever else is in the folder, other writers' half-written checkpoints included, is not looked at."""
    folder = tmp_path / "copy"
    shutil.copytree(good, folder)
    strange = ["tmp-3-1", "tmp-x", "step-3", "step-000000000003-old", "notes", "step-abc"]
    for name in strange:
        (folder / name).mkdir()
    (folder / "step-000000000004").symlink_to(folder / "step-000000000002")
    (folder / "step-000000000005").write_text("a file")
    assert outer.load(folder, TREE).step == 2
    outer.save(folder, TREE, step=3, keep=1)
    assert {p.name for p in folder.iterdir()} >= {*strange, "step-000000000004", "step-000000000005"}
    assert outer.load(folder, TREE).step == 3


def sign(path, change):
    """Rewrite a manifest with its checksum right again, as only a deliberate hand would."""
    manifest = json.loads((path / "manifest.json").read_text())["manifest"]
    change(manifest)
    (path / "manifest.json").write_bytes(checkpoint._encode(manifest))


def test_a_checkpoint_of_another_format_is_refused(good, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(good, folder)
    sign(folder / "step-000000000002", lambda manifest: manifest.update(format=2))
    with pytest.raises(ValueError, match=r"manifest.json has format 2, and this version .* reads format 1"):
        outer.load(folder, TREE)


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_loading_never_runs_what_is_in_a_file(tmp_path):
    """The strongest forgery: a pickle in place of an array, with all checksums right."""
    trap = tmp_path / "executed"
    folder = tmp_path / "run"
    outer.save(folder, {"a": np.zeros(2)}, step=1)
    path = outer.save(folder, {"a": np.ones(2)}, step=2)
    evil = np.empty(2, object)
    evil[:] = [Payload(trap), 0]
    for content in (pickle.dumps(Payload(trap)), npz(evil)):
        (path / "leaves.npz").write_bytes(content)

        def change(manifest, content=content):
            manifest["files"]["leaves.npz"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}

        sign(path, change)
        loaded, warned = read_quietly(folder, {"a": np.zeros(2)})
        assert loaded.step == 1 and "leaves.npz cannot be read" in warned
        assert not trap.exists()
    np.load(io.BytesIO(npz(evil)), allow_pickle=True)["0000"]
    assert trap.exists(), "the trap works: numpy with pickles allowed walks into it"


def npz(array):
    file = io.BytesIO()
    np.savez(file, **{"0000": array})
    return file.getvalue()


def test_a_file_is_never_read_outside_its_folder(tmp_path):
    """Paths in a manifest are compared, not opened; links and pipes are not followed."""
    secret = tmp_path / "secret"
    secret.write_bytes(npz(np.ones(2)))
    like = {"a": np.zeros(2)}
    outer.save(tmp_path / "run", like, step=1)
    path = outer.save(tmp_path / "run", {"a": np.ones(2)}, step=2)
    entry = json.loads((path / "manifest.json").read_text())["manifest"]["files"].pop("leaves.npz")
    for make in (
        lambda: sign(path, lambda m: m.update(files={"../../secret": entry, "leaves.npz": entry})),
        lambda: (path / "leaves.npz").symlink_to(secret),
        lambda: os.mkfifo(path / "leaves.npz"),
        lambda: (path / "leaves.npz").mkdir(),
    ):
        (path / "leaves.npz").unlink(missing_ok=True)
        make()
        loaded, warned = read_quietly(tmp_path / "run", like)
        assert loaded.step == 1 and str(path) in warned


def test_a_zip_that_claims_more_than_its_array_is_not_unpacked(tmp_path):
    path = outer.save(tmp_path, {"a": np.zeros(2)}, step=2)
    outer.save(tmp_path, {"a": np.zeros(2)}, step=1)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0000.npy", npz(np.zeros(10**6)))
    content = file.getvalue()
    (path / "leaves.npz").write_bytes(content)
    entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    sign(path, lambda manifest: manifest.update(files={"leaves.npz": entry}))
    assert "larger than its array" in read_quietly(tmp_path, {"a": np.zeros(2)})[1]


class Failing:
    """`os.<name>` that counts its calls and fails at one of them."""

    def __init__(self, monkeypatch, name, at, number=errno.ENOSPC):
        self.real, self.calls = getattr(os, name), 0

        def call(*args, **kwargs):
            self.calls += 1
            if self.calls - 1 == at:
                raise OSError(number, os.strerror(number))
            return self.real(*args, **kwargs)

        monkeypatch.setattr(os, name, call)


@pytest.mark.parametrize("name", ["write", "fsync", "rename", "mkdir", "open"])
def test_whichever_call_fails_the_last_good_checkpoint_survives(tmp_path, monkeypatch, name):
    tree = {"w": jnp.arange(3.0), "key": jax.random.key(0)}
    new = {"w": jnp.arange(3.0) + 1, "key": jax.random.key(1)}
    store = checkpoint.as_store("test", tmp_path)
    for step in range(3):  # as many as are kept, so that the save deletes one
        outer.save(tmp_path, tree, step=step)
    with monkeypatch.context() as patch:
        count = Failing(patch, name, at=-1)
        checkpoint.write(store, 3, new)
    assert outer.load(tmp_path, tree).step == 3
    assert count.calls >= {"write": 10, "fsync": 4, "rename": 2, "mkdir": 1, "open": 5}[name]
    failed = 0
    for at in range(count.calls):
        folder = tmp_path / f"{name}{at}"
        folder.mkdir()
        for step in range(3):
            shutil.copytree(tmp_path / "step-000000000002", folder / f"step-{step:012d}")
            sign(folder / f"step-{step:012d}", lambda manifest, step=step: manifest.update(step=step))
        with monkeypatch.context() as patch:
            Failing(patch, name, at)
            try:
                checkpoint.write(checkpoint.as_store("test", folder), 3, new)
            except OSError:
                failed += 1
        step, found = outer.load(folder, tree)
        assert step in (2, 3)
        assert bits(found) == bits(tree if step == 2 else new)
        left = [path.name for path in folder.iterdir() if path.name.startswith("tmp")]
        assert left == [] or name == "open", "a folder that cannot be opened cannot be emptied; the next run does it"
        assert checkpoint.write(checkpoint.as_store("test", folder), 4, new).exists(), "and the next one succeeds"
    assert failed >= count.calls - 2, "all but the deletion of an old one is reported"


def test_a_disk_that_takes_half_of_what_it_is_given_gets_the_rest(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, bytes(data)[: max(1, len(data) // 2)]))
    outer.save(tmp_path, TREE, step=1)
    assert_same_bits(outer.load(tmp_path, TREE).tree, TREE)


def put(*keys, value):
    """A change of a manifest: another value at a place in it."""

    def change(manifest):
        for key in keys[:-1]:
            manifest = manifest[key]
        if value is Ellipsis:
            del manifest[keys[-1]]
        else:
            manifest[keys[-1]] = value

    return change


WRONG = (None, True, -1, 1.5, "x", [], {}, [3], {"x": 3}, [[1]], 10**30, ...)
FORGERIES = {
    **{
        f"{name} {value!r}": put(name, value=value)
        for name in ("step", "store", "config", "notes", "treedef", "leaves", "files")
        for value in WRONG
        if (name, repr(value)) not in {("notes", "{}"), ("config", "{}"), ("notes", "{'x': 3}"), ("treedef", "'x'")}
    },
    **{
        f"leaf {name} {value!r}": put("leaves", 0, name, value=value)
        for name in ("path", "shape", "dtype", "sha256")
        for value in WRONG
    },
    **{
        f"file {name} {value!r}": put("files", "leaves.npz", name, value=value)
        for name in ("size", "sha256")
        for value in WRONG
    },
    "two leaves of one path": lambda manifest: manifest["leaves"].append(manifest["leaves"][0]),
    "no leaves": lambda manifest: manifest["leaves"].clear(),
    "log": lambda manifest: manifest.update(log=[[0, 256, "x", 1]], notes={}),
    "nothing at all": lambda manifest: manifest.clear(),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_manifest_of_another_form_is_damage_though_its_checksum_is_right(tmp_path, forgery):
    """Or another tree, where it describes one; never an error that says nothing of the file."""
    for step in (1, 2):
        outer.save(tmp_path, {"a": np.full(2, float(step))}, step=step)
    sign(tmp_path / "step-000000000002", FORGERIES[forgery])
    named = ""
    try:
        loaded, named = read_quietly(tmp_path, {"a": np.zeros(2)})
        assert loaded.step == 1
    except hg.InputError as error:
        named = str(error)
    assert "step-000000000002" in named


@pytest.mark.parametrize("text", [b"[]", b"3", b"null", b'{"manifest": []}', b"\xff\xfe", b"[" * 10**5, b""])
def test_what_is_no_manifest_is_damage(tmp_path, text):
    for step in (1, 2):
        outer.save(tmp_path, {"a": np.zeros(2)}, step=step)
    (tmp_path / "step-000000000002" / "manifest.json").write_bytes(text)
    assert read_quietly(tmp_path, {"a": np.zeros(2)})[0].step == 1
    for other in ([], 3, None, "x"):
        (tmp_path / "step-000000000002" / "manifest.json").write_bytes(checkpoint._encode(other))
        assert read_quietly(tmp_path, {"a": np.zeros(2)})[0].step == 1


@pytest.mark.parametrize("read_at", ["digests", "open_regular", "_identity"])
def test_a_reader_that_a_writer_overtakes_looks_again(tmp_path, monkeypatch, read_at):
    """At whatever instant the writer replaces all three checkpoints, the reader gets a whole one, without a warning."""
    from hypergrad.checkpoints import _durable

    tree = {"a": np.zeros(2)}
    for step in range(3):
        outer.save(tmp_path, tree, step=step)
    module = checkpoint if read_at == "_identity" else _durable
    real, calls = getattr(module, read_at), 0
    for overtaken in range(6):
        calls, begun = 0, checkpoint._candidates(tmp_path)[0][0] + 1

        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == overtaken + 1:
                monkeypatch.setattr(module, read_at, real)
                for step in range(begun, begun + 3):
                    outer.save(tmp_path, tree, step=step)
            return real(*args, **kwargs)

        monkeypatch.setattr(module, read_at, call)
        loaded, warned = read_quietly(tmp_path, tree)
        monkeypatch.setattr(module, read_at, real)
        assert warned == "" and begun - 1 <= loaded.step <= begun + 2


def test_a_reader_beside_a_writer_never_fails(tmp_path):
    import threading

    tree, stop, failed = {"a": np.zeros(2)}, threading.Event(), []
    outer.save(tmp_path, tree, step=0)

    def write():
        step = 1
        while not stop.is_set():
            outer.save(tmp_path, tree, step=step)
            step += 1

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(300):
            try:
                warned = read_quietly(tmp_path, tree)[1]
            except Exception as error:
                failed.append(repr(error))
            else:
                failed += [warned] if warned else []
    finally:
        stop.set()
        thread.join()
    assert failed == []


@pytest.mark.parametrize("kind", ["link to a file", "link to nothing", "link to itself", "folder", "pipe"])
def test_a_lock_that_is_no_file_is_named(tmp_path, kind):
    folder = tmp_path / "run"
    folder.mkdir()
    lock = folder / "lock"
    (tmp_path / "target").write_text("precious")
    {
        "link to a file": lambda: lock.symlink_to(tmp_path / "target"),
        "link to nothing": lambda: lock.symlink_to(tmp_path / "nothing"),
        "link to itself": lambda: lock.symlink_to(lock),
        "folder": lock.mkdir,
        "pipe": lambda: os.mkfifo(lock),
    }[kind]()
    with pytest.raises(CheckpointError, match=r"run/lock is not a regular file.*delete it"):
        outer.save(folder, {"a": np.zeros(2)}, step=1)
    assert (tmp_path / "target").read_text() == "precious" and not (tmp_path / "nothing").exists()


def test_several_processes_are_sent_to_orbax_before_anything_is_written(monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    words = r"save: npz files are written by one process, and this program has 2: pass hg\.outer\.orbax\(folder\)"
    with pytest.raises(hg.InputError, match=words):
        hg.outer.save(tmp_path / "runs", {"w": jnp.zeros(2)}, step=0)
    assert not list(tmp_path.iterdir())
