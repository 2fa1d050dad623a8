r"""One regularization strength per feature, compared with grid and random search at equal cost.

    min over λ of   mean over validation of ℓ(w*(λ)),    w*(λ) = argmin of   mean ℓ(w) + ½ Σⱼ exp(λⱼ) wⱼ²

The task is logistic regression on breast_cancer with 30 features. One strength is easy to search on a grid; 30
strengths are beyond any grid, whereas a hypergradient costs about as much as one more inner solve, for any number of
strengths.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg
from hypergrad._demo import data as datasets
from hypergrad._demo.methods import METHODS
from hypergrad._demo.outcome import Outcome, Search, verdict

DEFAULT_METHOD = "implicit"
STEPS = 60
LOWEST, HIGHEST = 1e-3, 10.0  # strengths that every search may choose
RATE = 0.2  # learning rate of the training, for methods that unroll it
TRAINING = 500


def train_loss(params: dict[str, Any], log_l2: Any, batch: Any) -> jax.Array:
    """Logistic loss with one strength per feature; the bias is not penalised."""
    return valid_loss(params, log_l2, batch) + 0.5 * jnp.sum(jnp.exp(log_l2) * params["w"] ** 2)


def valid_loss(params: dict[str, Any], log_l2: Any, batch: Any) -> jax.Array:
    """Mean logistic loss."""
    del log_l2
    x, y = batch
    return jnp.mean(optax.sigmoid_binary_cross_entropy(x @ params["w"] + params["b"], y))


def start() -> dict[str, jax.Array]:
    """Logistic regression on 30 features, at zero."""
    return {"w": jnp.zeros(30), "b": jnp.zeros(())}


def run(method: str, seed: int, steps: int | None) -> Outcome:
    """Tune, search, solve again at the strengths that each method chose, and compare."""
    data = datasets.tumours(seed)
    problem = hg.Problem(train_loss, valid_loss)
    low, high = math.log(LOWEST), math.log(HIGHEST)
    middle = np.full(30, (low + high) / 2)
    result = hg.tune(
        METHODS[method][1](problem, RATE, TRAINING),
        start(),
        middle,
        data.train,
        data.valid,
        outer=optax.adam(0.3),
        steps=steps or STEPS,
        domain=hg.domains.interval(low, high),
    )
    count = len(result.history.value)  # as many steps as Ctrl-C left; the other methods get as many

    w_star = hg.best_response(problem)
    evaluate = jax.jit(lambda log_l2: _evaluate(w_star, data, log_l2))

    def finish(label: str, losses: np.ndarray, chosen: np.ndarray) -> Search:
        _, loss, accuracy = evaluate(chosen)
        return Search(label, losses, chosen, float(loss), float(accuracy))

    def search(label: str, candidates: np.ndarray) -> Search:
        losses = np.array([evaluate(row)[0] for row in candidates])
        return finish(label, losses, candidates[np.nanargmin(losses)])

    rng = np.random.default_rng(seed)
    searches = [
        finish("hypergradient, 30 strengths", result.history.value, np.asarray(result.best.hparams)),
        search("random search, 30 strengths", rng.uniform(low, high, (count, 30))),
        search("random search, one strength", np.tile(rng.uniform(low, high, (count, 1)), 30)),
        search("grid search, one strength", np.tile(np.linspace(low, high, count)[:, None], 30)),
    ]
    plain = finish(f"untuned, {math.exp(middle[0]):g} everywhere", np.array([evaluate(middle)[0]]), middle)
    return _report(data, result, searches, plain)


def _evaluate(w_star: Any, data: datasets.Tumours, log_l2: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Validation loss, test loss and test accuracy at the optimum of the training loss."""
    params = w_star(log_l2, start(), data.train)
    x, y = data.test
    accuracy = jnp.mean((x @ params["w"] + params["b"] > 0) == y)
    return valid_loss(params, log_l2, data.valid), valid_loss(params, log_l2, data.test), accuracy


def _report(data: datasets.Tumours, result: hg.Result, searches: list[Search], plain: Search) -> Outcome:
    def row(search: Search) -> tuple[str, ...]:
        return (
            search.label,
            str(len(search.losses)),
            f"{np.nanmin(search.losses):.4f}",
            f"{search.test_loss:.4f}",
            f"{search.test_accuracy:.3f}",
        )

    table = [
        ("Strengths chosen on the validation set", "inner solves", "valid. loss", "test loss", "test accuracy"),
        *map(row, searches),
        row(plain),
    ]
    tuned = searches[0]
    order = np.argsort(tuned.log_l2)
    notes = [
        "Every search had as many inner solves; a hypergradient solves one adjoint system beside each.",
        "Least regularized: " + ", ".join(data.names[i] for i in order[:3]) + "; "
        "most: " + ", ".join(data.names[i] for i in order[-3:]) + ".",
        verdict(result),
    ]
    names = ("tuned", "random_per_feature", "random", "grid")
    numbers: dict[str, Any] = {"plain": plain.test_accuracy, "tuned": tuned.test_accuracy, "oracle": None, "f1": None}
    for name, search in zip(names, searches, strict=True):
        numbers |= {
            f"{name}_valid_loss": float(np.nanmin(search.losses)),
            f"{name}_test_loss": search.test_loss,
            f"{name}_test_accuracy": search.test_accuracy,
        }
    return Outcome(table, notes, numbers, functools.partial(_draw, data, searches))


def _draw(data: datasets.Tumours, searches: list[Search], path: str) -> None:
    from hypergrad._demo.figures import draw_l2

    draw_l2(data, searches, path)
