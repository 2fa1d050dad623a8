"""The faults of the list that are mistakes of the caller: each is named in a message before anything compiles.

Every mistake is made with every solver that can meet it: as it is, under `jax.jit` and under `jax.vmap`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg
from tests.reliability._family import HPARAM, RATE, STEPS, Member, inner_loss, outer_loss
from tests.reliability._methods import METHODS

MODES = ("eager", "jit", "vmap")
INT = jnp.asarray(1, jnp.int32)
W = jnp.zeros(3)


class Mistake(NamedTuple):
    """One mistake.

    Attributes:
        number: in the list of sixty.
        what: in words.
        words: what the message must hold: argument, path, what was found, what to write.
        changes: to `params`, `hparams`, `train`, `valid`, `inner_loss`, `outer_loss`, `model_state`, `problem`.
        warns: whether a warning is the outcome.
        skip: methods that cannot make it.
    """

    number: int
    what: str
    words: tuple[str, ...]
    changes: dict[str, Any]
    warns: bool = False
    skip: Callable[[str], bool] = lambda name: False


def _train(**changes: Any) -> dict[str, Any]:
    return Member().data()[0] | changes


def _uses_map(name: str) -> bool:
    return name == "fixed point, GMRES"


MISTAKES: tuple[Mistake, ...] = (
    Mistake(28, "integer hyperparameter", ("hparams['l2']", "int32", "float"), {"hparams": {"l2": INT}}),
    Mistake(28, "integer parameter", ("params['w']", "int32", "float"), {"params": {"w": jnp.zeros(3, jnp.int32)}}),
    Mistake(29, "PRNG key as hyperparameter", ("hparams[0]", "PRNG key", "key="), {"hparams": [jax.random.key(0)]}),
    Mistake(31, "no hyperparameters", ("hparams has no leaves", "{'l2': 0.1}"), {"hparams": {}}),
    Mistake(31, "no parameters", ("params has no leaves",), {"params": ()}),
    Mistake(33, "complex hyperparameter", ("hparams['l2']", "complex", "float"), {"hparams": {"l2": 1j}}),
    Mistake(
        36,
        "outer loss a vector",
        ("outer_loss", "scalar", "(3,)", "mean or sum"),
        {"outer_loss": lambda w, h, batch: h * w},
    ),
    Mistake(
        37,
        "model state missing from the result",
        ("inner_loss must return (loss, model_state)",),
        {
            "inner_loss": lambda w, h, batch, state: inner_loss(w, h, batch),
            "outer_loss": lambda w, h, batch, state: outer_loss(w, h, batch),
            "model_state": {"mean": jnp.zeros(2)},
            "problem": {"model_state": True},
        },
        skip=_uses_map,
    ),
    Mistake(
        26,
        "model state of another shape",
        ("model_state", "['mean']", "(3,)", "(2,)"),
        {
            "inner_loss": lambda w, h, batch, state: (inner_loss(w, h, batch), {"mean": jnp.zeros(3)}),
            "outer_loss": lambda w, h, batch, state: outer_loss(w, h, batch),
            "model_state": {"mean": jnp.zeros(2)},
            "problem": {"model_state": True},
        },
        skip=_uses_map,
    ),
    Mistake(38, "training data empty", ("train['b']", "empty", "(0,)"), {"train": _train(b=jnp.zeros(0))}),
    Mistake(39, "validation data empty", ("valid['c']", "empty", "(0,)"), {"valid": {"c": jnp.zeros(0)}}),
    Mistake(
        19,
        "misspelt hyperparameter",
        ("hparams['l3']", "misspelt key"),
        {
            "hparams": {"l2": jnp.asarray(HPARAM), "l3": jnp.asarray(1.0)},
            "inner_loss": lambda w, h, batch: inner_loss(w, h["l2"], batch),
            "outer_loss": lambda w, h, batch: outer_loss(w, h["l2"], batch),
        },
        warns=True,
        # The map is written for one number; hg.direct says INSENSITIVE of what the outer loss does not see.
        skip=lambda name: _uses_map(name) or name == "direct",
    ),
)


def make(name: str, mistake: Mistake, mode: str) -> Any:
    """Make the mistake. Under jit and vmap nothing is compiled: the call is traced, and no more."""
    changes = {
        "params": W,
        "hparams": jnp.asarray(HPARAM),
        "inner_loss": inner_loss,
        "outer_loss": outer_loss,
        "model_state": None,
        "problem": {},
    }
    changes |= dict(zip(("train", "valid"), Member().data(), strict=True)) | mistake.changes
    problem = hg.Problem(changes["inner_loss"], changes["outer_loss"], **changes["problem"])
    solver = METHODS[name].make(problem)

    def call(hparams: Any, train: Any) -> Any:
        state = solver.init(changes["params"], hparams, model_state=changes["model_state"])
        return solver.hypergrad(state, hparams, train, changes["valid"])[0]

    hparams, train = changes["hparams"], changes["train"]
    if mode == "eager":
        return call(hparams, train)
    if mode == "jit":
        return jax.eval_shape(call, hparams, train)
    twice = lambda tree: jax.tree.map(lambda x: jnp.stack([jnp.asarray(x)] * 2), tree)
    return jax.eval_shape(jax.vmap(call), twice(hparams), twice(train))


def learning_rate(solver: Callable[[hg.Problem, Any], hg.Solver]) -> Any:
    """A hyperparameter that only the optimizer sees (18)."""
    problem = hg.Problem(lambda w, h, b: inner_loss(w, h["l"], b), lambda w, h, b: outer_loss(w, h["l"], b))
    inner = hg.inner.gradient(lambda h: optax.sgd(h["rate"]), steps=STEPS)
    made, hparams = solver(problem, inner), {"l": jnp.asarray(HPARAM), "rate": jnp.asarray(RATE)}
    return made.hypergrad(made.init(W, hparams), hparams, *Member().data())[0]


def accepted(name: str, hparams: Any, params: Any = W) -> hg.Hypergradient:
    """What is no mistake: Python numbers, None leaves, mixed precision. (30, 32, 34)"""
    number = lambda h: sum(jax.tree.leaves(h))
    problem = hg.Problem(
        lambda w, h, b: inner_loss(w["w"], number(h), b), lambda w, h, b: outer_loss(w["w"], number(h), b)
    )
    made = METHODS[name].make(problem)
    return jax.eval_shape(
        lambda train, valid: made.hypergrad(made.init({"w": params, "none": None}, hparams), hparams, train, valid)[0],
        *Member().data(),
    )


def labels(value: int) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels of three classes, one of which is `value`."""
    y = np.arange(12) % 3
    y[7] = value
    return np.random.default_rng(0).normal(size=(12, 4)), y
