"""Every option of every public function: a wrong name, a wrong type and a number out of range are each refused, before
anything is traced, in a message that names function, option, what was found and what is allowed.

The functions and their options are read from the package, so that a new one is walked as well.
"""

from __future__ import annotations

import inspect
from typing import Any

import jax.numpy as jnp
import optax
import pytest

import hypergrad as hg
from hypergrad._checks import _RULES
from tests.test_public_api import FUNCTIONS

PROBLEM = hg.Problem(lambda w, h, b: h * jnp.sum(w**2), lambda w, h, b: jnp.sum(w))
INNER = hg.inner.gradient(optax.sgd(0.1), steps=3)
NEEDED: dict[str, Any] = {  # what a call must hold besides
    "problem": PROBLEM,
    "inner": INNER,
    "optimizer": optax.sgd(0.1),
    "map": lambda w, h, b: w,
    "solver": hg.unrolled(PROBLEM, inner=INNER),
    "params": jnp.zeros(3),
    "hparams": 0.5,
    "outer": optax.sgd(0.1),
    "steps": 3,
    "rank": 2,
    "damping": 0.1,
    "max_steps": 3,
    "lo": 0,
    "hi": 1,
    "along": None,
    "folder": "nowhere",
    "tree": {},
    "like": {},
    "step": 0,
}
WALKED = {path: f for path, f in FUNCTIONS.items() if hasattr(f, "__wrapped__")}
NUMBERS = [
    (path, name)
    for path, function in WALKED.items()
    for name in inspect.signature(function).parameters
    if name in _RULES
]


def call(path: str, **changes: Any) -> Any:
    """The function with what it needs, and `changes`."""
    parameters = inspect.signature(WALKED[path]).parameters
    needed = [n for n, p in parameters.items() if p.default is p.empty and n not in changes]
    return WALKED[path](**{n: NEEDED[n] for n in needed}, **changes)


def test_the_walk_meets_the_functions_with_options():
    names = {path.rsplit(".", 1)[-1] for path in WALKED}
    assert {"implicit", "unrolled", "direct", "best_response", "tune", "check", "gradient", "lbfgs", "newton"} <= names
    assert {"fixed_point", "cg", "neumann", "gmres", "nystrom", "dense", "identity", "jacobi"} <= names
    assert len(NUMBERS) > 25


@pytest.mark.parametrize("path", WALKED)
def test_a_misspelt_option_is_refused_with_the_nearest_known(path):
    name = list(inspect.signature(WALKED[path]).parameters)[-1]
    with pytest.raises(hg.InputTypeError) as error:
        call(path, **{f"{name}_": 1})
    function = path.rsplit(".", 1)[-1]
    assert f"{function}: unknown option '{name}_', did you mean '{name}'?" in str(error.value)


PREFIXES = {("hypergrad.self_tuning", "scale")}  # may be a pytree of numbers: a list is one


@pytest.mark.parametrize(
    ("path", "option", "wrong"),
    [(*n, w) for n in NUMBERS for w in ("text", [1, 2], True, float("nan")) if n not in PREFIXES or w != [1, 2]],
    ids=lambda x: str(x),
)
def test_what_is_no_number_is_refused(path, option, wrong):
    with pytest.raises(hg.HypergradError) as error:
        call(path, **{option: wrong})
    message = str(error.value)
    assert f"{path.rsplit('.', 1)[-1]}: {option} must be" in message
    assert f"found {wrong!r}" in message


@pytest.mark.parametrize(("path", "option"), NUMBERS)
def test_a_number_out_of_range_is_refused_with_the_bound(path, option):
    low, closed, _ = _RULES[option]
    if path.endswith("neumann") and option == "max_steps":
        low = 0  # T1-T2
    wrong = low - 1 if closed else low
    with pytest.raises(hg.InputError) as error:
        call(path, **{option: wrong})
    assert f"{path.rsplit('.', 1)[-1]}: {option} must be" in str(error.value)
    assert f"found {wrong!r}" in str(error.value)
