"""Labels outside their classes are found in the data before anything is compiled, and nothing else is."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad._data import Stacked
from hypergrad._jaxpr.labels import check_concrete_data, check_labels, check_solver_labels
from hypergrad._solver import Hypergradient, Info, InputError, Solver

ROWS, CLASSES = 20, 3
RNG = np.random.default_rng(0)
X = RNG.normal(size=(ROWS, 4)).astype(np.float32)
Y = np.arange(ROWS) % CLASSES
W = jnp.zeros((4, CLASSES), jnp.float32)
ROW = 13


def data(label, row=ROW, **more):
    y = Y.copy()
    y[row] = label
    return {"x": X, "y": y, **more}


def log_probs(w, batch):
    return jax.nn.log_softmax(batch["x"] @ w)


def cross_entropy(w, batch, y):
    return optax.softmax_cross_entropy_with_integer_labels(batch["x"] @ w, y)


def scanned(w, hparams, batch):
    def turn(total, row):
        return total + jax.nn.log_softmax(row["x"] @ w)[row["y"]], None

    return jax.lax.scan(turn, jnp.zeros((), X.dtype), batch)[0]


def in_chunks(w, hparams, batch):
    """Labels cut into chunks of two rows, and a loop in a loop."""
    x, y = batch["x"].reshape(-1, 2, 4), batch["y"].reshape(-1, 2)
    rows = jax.lax.map(lambda c: jnp.sum(jax.lax.map(lambda r: jax.nn.log_softmax(r[0] @ w)[r[1]], c)), (x, y))
    return jnp.mean(rows)


USES = {
    "fancy index": lambda w, h, b: jnp.mean(log_probs(w, b)[jnp.arange(b["y"].size), b["y"]]),
    "take_along_axis": lambda w, h, b: jnp.mean(jnp.take_along_axis(log_probs(w, b), b["y"][:, None], axis=1)),
    "optax": lambda w, h, b: jnp.mean(cross_entropy(w, b, b["y"])),
    "one_hot": lambda w, h, b: jnp.mean(log_probs(w, b) * jax.nn.one_hot(b["y"], CLASSES)),
    "compared with a range": lambda w, h, b: jnp.sum(
        jnp.where(b["y"][:, None] == np.arange(CLASSES)[None], log_probs(w, b), 0)
    ),
    "rows of eye": lambda w, h, b: jnp.mean(log_probs(w, b) * jnp.eye(CLASSES)[b["y"]]),
    "vmap": lambda w, h, b: jnp.mean(jax.vmap(lambda p, y: p[y])(log_probs(w, b), b["y"])),
    "scan": scanned,
    "loops in chunks": in_chunks,
    "class weights": lambda w, h, b: jnp.mean(jnp.arange(1.0, 4.0)[b["y"]] * jnp.sum(w)),
    "shifted and back": lambda w, h, b: jnp.mean(cross_entropy(w, b, (b["y"] + 1) - 1)),
    "gradient": lambda w, h, b: jnp.sum(jax.grad(lambda w: jnp.mean(cross_entropy(w, b, b["y"])))(w)[0, 0]),
    "jit and remat": lambda w, h, b: jax.jit(jax.checkpoint(lambda w: jnp.mean(cross_entropy(w, b, b["y"]))))(w),
    "cond": lambda w, h, b: jax.lax.cond(jnp.sum(w) > 1e9, jnp.sum, lambda w: jnp.mean(cross_entropy(w, b, b["y"])), w),
    "small integers": lambda w, h, b: jnp.mean(cross_entropy(w, b, b["y"].astype(jnp.int8))),
    "binary mask beside": lambda w, h, b: jnp.mean(cross_entropy(w, b, b["y"]) * (1 + (b["y"] == 1))),
    "one mask among two": lambda w, h, b: jnp.sum(jnp.where(b["y"] != 7, cross_entropy(w, b, b["y"]), 0)),
}

MASKED = {
    "where before": lambda w, h, b: jnp.mean(cross_entropy(w, b, jnp.where((b["y"] < 0) | (b["y"] > 2), 0, b["y"]))),
    "clip": lambda w, h, b: jnp.mean(cross_entropy(w, b, jnp.clip(b["y"], 0, CLASSES - 1))),
    "remainder": lambda w, h, b: jnp.mean(cross_entropy(w, b, b["y"] % CLASSES)),
    "maximum and minimum": lambda w, h, b: jnp.mean(cross_entropy(w, b, jnp.minimum(jnp.maximum(b["y"], 0), 2))),
    "where after": lambda w, h, b: jnp.sum(jnp.where((b["y"] >= 0) & (b["y"] < 3), cross_entropy(w, b, b["y"]), 0)),
    "product after": lambda w, h, b: jnp.sum(jnp.nan_to_num(cross_entropy(w, b, b["y"])) * b["keep"]),
    "weights in the data": lambda w, h, b: jnp.sum(jnp.where(b["keep"], cross_entropy(w, b, b["y"]), 0)),
    "take with clip": lambda w, h, b: jnp.sum(jnp.take(w, b["y"], axis=1, mode="clip")),
    "take with a fill value": lambda w, h, b: jnp.sum(jnp.take(w, b["y"], axis=1, mode="fill", fill_value=0)),
    "no label": lambda w, h, b: jnp.sum((b["x"] @ w)[:, 0] - b["y"]),
    "a column not used": lambda w, h, b: jnp.mean(cross_entropy(w, b, jnp.stack([b["y"] * 0, b["y"]], 1)[:, 0])),
}


def batches(arrays):
    return {
        "full": arrays,
        "minibatches": hg.minibatches(arrays, 6),
        "stacked": Stacked(jax.tree.map(lambda x: x.reshape(5, 4, *x.shape[1:]), arrays)),
    }


@pytest.mark.parametrize("use", USES)
def test_a_label_outside_its_classes_is_found_at_its_row(use):
    check_labels(USES[use], W, {}, data(1), "train")
    for label in (CLASSES, -1):
        message = rf"^train\['y'\]: labels run from 0 to 2, found {label} at row {ROW}\. .*mask"
        with pytest.raises(InputError, match=message):
            check_labels(USES[use], W, {}, data(label), "train")


@pytest.mark.parametrize("form", ["minibatches", "stacked"])
@pytest.mark.parametrize("use", ["fancy index", "one_hot", "scan", "loops in chunks"])
def test_every_batch_is_searched(use, form):
    check_labels(USES[use], W, {}, batches(data(1))[form], "train")
    where = rf"row {ROW}" if form == "minibatches" else rf"index \({ROW // 4}, {ROW % 4}\)"
    with pytest.raises(InputError, match=rf"found 3 at {where}\."):
        check_labels(USES[use], W, {}, batches(data(CLASSES))[form], "train")


@pytest.mark.parametrize("label", [CLASSES, -100])
@pytest.mark.parametrize("mask", MASKED)
def test_what_the_loss_masks_may_hold_anything(mask, label):
    keep = np.arange(ROWS) != ROW
    for batch in batches(data(label, keep=keep)).values():
        check_labels(MASKED[mask], W, {}, batch, "train")


def test_a_mask_for_one_label_does_not_excuse_another():
    loss = lambda w, h, b: jnp.sum(jnp.where(b["y"] >= 0, cross_entropy(w, b, b["y"]), 0))
    batch = data(-1)
    batch["y"][5] = CLASSES
    with pytest.raises(InputError, match=r"found 3 at row 5\."):
        check_labels(loss, W, {}, batch, "train")


def test_the_message_counts_the_others_and_shows_what_became_of_the_label():
    batch = data(CLASSES)
    batch["y"] = batch["y"] + 1
    batch["y"][2] = 9
    with pytest.raises(InputError, match=r"found 9 \(which the loss turns into 8\) at row 2 and 1 more"):
        check_labels(lambda w, h, b: jnp.mean(cross_entropy(w, b, b["y"] - 1)), W, {}, batch, "train")


def test_columns_and_tokens_keep_their_index():
    table = np.stack([Y, np.full(ROWS, 7)], axis=1)
    table[4, 0] = 5
    with pytest.raises(InputError, match=r"^valid: labels run from 0 to 2, found 5 at index \(4, 0\)"):
        check_labels(lambda w, h, b: jnp.mean(w[0, b[:, 0]] + w[1, 0] * b[:, 1]), W, {}, table, "valid")


def test_many_classes_and_integer_pixels_cost_nothing_and_raise_nothing():
    pixels = RNG.integers(0, 256, (ROWS, 4), dtype=np.uint8)
    loss = lambda w, h, b: jnp.mean(cross_entropy(w, {"x": b["x"] / 255.0}, b["y"]))
    check_labels(loss, W, {}, {"x": pixels, "y": Y}, "train")


def test_mistakes_of_another_kind_are_left_to_those_who_name_them():
    def broken(w, h, b):
        raise RuntimeError("not here")

    check_labels(broken, W, {}, data(CLASSES), "train")
    check_labels(USES["optax"], W, {}, None, "train")
    check_labels(USES["optax"], W, {}, hg.stream(iter([]), 1), "train")
    jax.jit(lambda b: check_labels(USES["optax"], W, {}, b, "train"))(data(CLASSES))


def solver_of(inner, outer):
    """One gradient step: enough of a solver to hold two losses."""

    def hypergrad(state, hparams, train=None, valid=None, *, key=None):
        params = state - 0.1 * jax.grad(inner)(state, hparams, train)
        info = Info(*[jnp.zeros(())] * 6, extra={})
        return Hypergradient(outer(params, hparams, valid), hparams, info, {}), params

    def init(params, hparams, *, key=None, model_state=None):
        return params

    return Solver(init, hypergrad, lambda state, hparams: state)


@pytest.mark.parametrize("name", ["train", "valid"])
def test_labels_are_checked_through_a_solver(name):
    loss = USES["optax"]
    sets = {"train": data(1), "valid": data(1, row=0)}
    check_solver_labels(solver_of(loss, loss), W, {}, sets["train"], sets["valid"], None)
    sets[name] = data(CLASSES)
    with pytest.raises(InputError, match=rf"^{name}\['y'\]: .*found 3 at row {ROW}\."):
        check_solver_labels(solver_of(loss, loss), W, {}, sets["train"], sets["valid"], None)


def test_nan_in_the_data_is_a_warning_with_path_count_and_row():
    bad = X.copy()
    bad[7, 2] = bad[9, 0] = np.nan
    for batch in batches({"x": bad, "y": Y}).values():
        with pytest.warns(UserWarning, match=rf"train\['x'\] holds 2 NaN of {X.size} .* first at index \((7|1, 3)"):
            check_concrete_data("train", batch)


def test_clean_data_keys_and_traced_data_give_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_concrete_data("train", {"x": X, "inf": np.array([np.inf]), "y": Y, "key": jax.random.key(0), "no": None})
        jax.jit(lambda x: check_concrete_data("train", x))(np.array([np.nan]))
