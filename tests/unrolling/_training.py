"""A training step with everything in it: Adam's moments, a rate that is tuned, a model's state, and a counter."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg
from hypergrad._problem import bind_inner
from hypergrad.unrolling.step import Point, make_step

RNG = np.random.default_rng(0)
H = {"rate": jnp.asarray(0.07), "l2": jnp.asarray(RNG.normal(size=3))}


def _loss(w, h, batch, state):
    value = jnp.sum(jnp.cos(w) * jnp.exp(h["l2"])) + jnp.sum(state["mean"] * w**2)
    return value, {"mean": 0.5 * state["mean"] + 0.1 * w, "seen": state["seen"] + 1}


PROBLEM = hg.Problem(_loss, lambda w, h, batch, state: jnp.sum(w), model_state=True)
INNER = hg.inner.gradient(lambda h: optax.adam(h["rate"]), steps=7)
OBJECTIVE = bind_inner(PROBLEM, None, None, {"mean": jnp.zeros(3), "seen": jnp.int32(0)})


def start() -> Point:
    params = jnp.asarray([0.4, -0.9, 1.3])
    return Point(params, INNER.init(params, H), {"mean": jnp.asarray([0.1, 0.3, -0.2]), "seen": jnp.int32(0)})


def training():
    """The step, and where it begins: one step on, so that no moment is zero."""
    step = make_step(INNER, OBJECTIVE, H, start())
    return step, step.take(start(), 0).point
