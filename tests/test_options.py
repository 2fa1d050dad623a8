"""Every option of every public function: a wrong name, a wrong type and a number out of range are each refused, before
anything is traced, in a message that names function, option, what was found and what is allowed.

The options and their ranges are read from the functions themselves, so that a new one is walked as well.
"""

from __future__ import annotations

import functools
import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad._options import declared
from hypergrad.solvers.regularity import CONSTANTS
from tests.test_public_api import FUNCTIONS

PROBLEM = hg.Problem(lambda w, h, b: h * jnp.sum(w**2), lambda w, h, b: jnp.sum(w))
INNER = hg.inner.gradient(optax.sgd(0.1), steps=3)
FUNCTION = lambda first, *rest: first
NEEDED: dict[str, Any] = {  # what a call must hold besides, where it is not a function
    "problem": PROBLEM,
    "inner": INNER,
    "optimizer": optax.sgd(0.1),
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
    "arrays": jnp.zeros(3),
    "size": 2,
    "method": "soba",
    "step_size": 0.1,
    "iterator": [],
    "loss": PROBLEM.inner_loss,
    "chunks": 1,
    "k": 2,
    "per_step": 1,
    "images": jnp.zeros((2, 4, 4)),
    "x": jnp.zeros((2, 4)),
    "v": jnp.zeros((2, 4)),
    "l1": 0.5,
    "l2": 0.5,
    "rate": 0.5,
    "scaling": hg.scaling.infer({"w": jnp.ones(2)}, {"w": jnp.ones(4)}, rule="adam"),
    "rule": "adam",
    "widths": (2, 4),
    "batch": jnp.zeros((2, 3)),
    "tuned": {"w": jnp.ones(2)},
    "wider": {"w": jnp.ones(4)},
    "strength": 0.5,
    "scale": 0.5,
    "shift": 0.5,
    "length": 0.5,
    "holes": 1.0,
    "noise": 0.5,
    "divergence": "exact",
    "logits": jnp.zeros((2, 2)),
    "labels": jnp.eye(2),
    "width": 0.5,
    "by": "moments",
    "count": 2,
    "tol": 0.1,
    "samples": 10,
    "parts": 2,
    "moments": hg.objectives.function_moments([(jnp.ones((4, 1)), jnp.zeros(1))], jnp.ones((2, 4))),
    "max_holes": 2,
    "key": jax.random.key(0),
    "likelihood": "categorical",
    "precision": 1.0,
    "kappa": "data",
    "mean": jnp.zeros(3),
    "posterior": None,
    "rows": 3,
    "burn_in": 3,
    "hyper_steps": 3,
    "kernel": jnp.eye(2),
}
WALKED = {path: f for path, f in FUNCTIONS.items() if hasattr(f, "__options__")}
# Without any option that could be wrong: data and results, or nothing at all.
PLAIN = {"compose", "constrain", "raise_if_failed", "orbax", "gated", "log", "positive", "real", "simplex"}
PLAIN |= {"to_constrained", "to_unconstrained", "losses", "hyperparameters", "hypergradient", "landscape", "options"}
PLAIN |= {"set_options", "lds", "loo_correlation", "json_lines", "coordinates"}
ALL = [(path, name, option) for path, f in WALKED.items() for name, option in declared(f).items()]
NUMBERS = [case for case in ALL if isinstance(case[2], hg.Number)]
NAMED = functools.partial(pytest.mark.parametrize, ids=lambda x: x if isinstance(x, str) else "")


def call(path: str, **changes: Any) -> Any:
    """The function with what it needs, and `changes`."""
    parameters = inspect.signature(WALKED[path]).parameters
    needed = [n for n, p in parameters.items() if p.default is p.empty and n not in changes]
    return WALKED[path](**{n: NEEDED.get(n, FUNCTION) for n in needed}, **changes)


def refused(path: str, name: str, value: Any, error: Any = (hg.InputError, hg.InputTypeError)) -> str:
    """The message with which it is refused, which must begin with function, option and "must be"."""
    with pytest.raises(error) as raised:
        call(path, **{name: value})
    message = str(raised.value)
    assert message.startswith(f"{path.rsplit('.', 1)[-1]}: {name}")
    assert " must be " in message
    assert "found " in message
    return message


def beyond(option: hg.Number) -> list[float]:
    """Numbers just outside of the range, at each of its ends."""
    step = 1 if option.integer else 0.5
    numbers = [option.least - step, option.above, option.most + step, option.below]
    found = [x for x in numbers if math.isfinite(x)]
    return [int(x) for x in found] if option.integer else found


def test_every_public_function_declares_its_options():
    undeclared = {path.rsplit(".", 1)[-1] for path in FUNCTIONS} - {path.rsplit(".", 1)[-1] for path in WALKED}
    assert undeclared <= PLAIN, "declare its options with @options(...) above the function"
    kinds = {
        (path, name): parameter
        for path, f in FUNCTIONS.items()
        for name, parameter in inspect.signature(f).parameters.items()
        if isinstance(parameter.default, (int, float)) and not isinstance(parameter.default, bool)
        if "tuple" not in str(parameter.annotation)  # axes, of which one may be written as a number
    }
    known = {(path, name) for path, name, _ in ALL}
    assert sorted(set(kinds) - known) == [], "numbers without a range"
    assert len(NUMBERS) > 45


def test_defaults_lie_in_their_ranges():
    for path, name, option in ALL:
        default = inspect.signature(WALKED[path]).parameters[name].default
        if default is not inspect.Parameter.empty and isinstance(default, (int, float, str)) and default != "default":
            option.check(path, name, default)


@pytest.mark.parametrize("path", WALKED)
def test_a_misspelt_option_is_refused_with_the_nearest_known(path):
    name = list(inspect.signature(WALKED[path]).parameters)[-1]
    with pytest.raises(hg.InputTypeError) as error:
        call(path, **{f"{name}_": 1})
    function = path.rsplit(".", 1)[-1]
    assert f"{function}: unknown option '{name}_', did you mean '{name}'?" in str(error.value)


@NAMED(("path", "name", "option"), NUMBERS)
def test_what_is_no_number_is_refused(path, name, option):
    wrong = ["text", True, float("nan"), 1j, [1, 2], {"a": "text"}, np.ones(2), jnp.ones((1,))]
    for value in wrong[: 4 if option.every else None]:
        message = refused(path, name, value)
        assert f"found {value!r}" in message
    if option.integer:
        refused(path, name, 1.5, hg.InputTypeError)
    if inspect.signature(WALKED[path]).parameters[name].default is not None and not option.every:
        refused(path, name, None, hg.InputTypeError)
    refused(path, name, math.inf)


@NAMED(("path", "name", "option"), NUMBERS)
def test_a_number_out_of_range_is_refused_with_the_bound(path, name, option):
    for value in beyond(option):
        message = refused(path, name, value, hg.InputError)
        assert f"must be {option.range}, found {value!r}" in message
        assert option.advice in message


@NAMED(("path", "name", "option"), [case for case in NUMBERS if case[2].static])
def test_a_traced_number_is_refused_where_the_program_needs_its_value(path, name, option):
    dtype = jnp.int32 if option.integer else jnp.float32

    def traced(value: Any) -> Any:
        message = refused(path, name, value, hg.InputTypeError)
        assert "known before anything is compiled" in message
        return value

    jax.eval_shape(traced, jax.ShapeDtypeStruct((), dtype))


@pytest.mark.parametrize("make", [hg.inner.lbfgs, hg.inner.newton, hg.linear.cg, hg.linear.dense, hg.linear.gmres])
def test_a_traced_tolerance_is_a_number(make):
    jax.eval_shape(lambda tol: make(tol=tol).options["tol"], jax.ShapeDtypeStruct((), jnp.float32))
    with pytest.raises(hg.InputTypeError, match="tol must be a number"):
        jax.eval_shape(lambda tol: make(tol=tol).options["tol"], jax.ShapeDtypeStruct((2,), jnp.float32))


@NAMED(("path", "name", "option"), [case for case in ALL if isinstance(case[2], hg.Choice)])
def test_one_of_several_words_with_a_slip_is_refused_with_the_nearest(path, name, option):
    for word in option.allowed:
        with pytest.raises(hg.InputError, match=rf"{name} must be one of .*found '{word}_'.*did you mean"):
            call(path, **{name: f"{word}_"})
    refused(path, name, 3, hg.InputError)


@NAMED(("path", "name", "option"), [case for case in ALL if isinstance(case[2], hg.Slot)])
def test_an_object_of_another_kind_is_refused_with_what_to_write(path, name, option):
    wrong = {"'cg'": "cg", "int": 3, "hg.linear.cg()": hg.linear.cg, "hg.inner.gradient(...)": hg.inner.gradient}
    wrong |= {"the function adam": optax.adam} if option.kind != ("__call__",) else {}
    wrong |= {"an optax optimizer": optax.sgd(0.1)} if option.kind != ("init", "update") else {}
    for words, value in wrong.items():
        message = refused(path, name, value, hg.InputTypeError)
        assert f"{name} must be {option.what}, found " in message
        assert words in message
        assert f"write {option.write}" in message


def test_every_slot_is_declared():
    slots = {"problem", "inner", "linear", "preconditioner", "optimizer", "scale_optimizer", "response", "solver"}
    found = {(path, name) for path, f in WALKED.items() for name in inspect.signature(f).parameters if name in slots}
    known = {(path, name) for path, name, option in ALL if isinstance(option, hg.Slot)}
    # These say for themselves what they take: an optimizer or a function that makes one.
    assert found - known <= {("hypergrad.inner.gradient", "optimizer")}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_of_regularity_have_a_range(name):
    known = hg.Regularity(1.0, 1.0, 1.0)
    state = hg.implicit(PROBLEM, regularity=known).init(jnp.zeros(3), 0.5)
    for value in (-1.0, "text", float("nan"), True, np.ones(2)):
        solver = hg.implicit(PROBLEM, regularity=known._replace(**{name: value}))
        with pytest.raises((hg.InputError, hg.InputTypeError), match=f"implicit: {name} must be .*found "):
            solver.hypergrad(state, 0.5)


def test_a_factory_of_ones_own_declares_its_options():
    @hg.options(
        problem=hg.Slot(hg.Problem, "an hg.Problem", "hg.Problem(inner_loss, outer_loss)"),
        temperature=hg.Number(above=0, most=2, advice="write 1.0 for none"),
        rounds=hg.Number(least=1, integer=True, static=True),
        kind=hg.Choice(("warm", "cold")),
    )
    def annealed(problem, *, temperature, rounds=3, kind="warm"):
        return problem, temperature, rounds, kind

    assert annealed(PROBLEM, temperature=0.5) == (PROBLEM, 0.5, 3, "warm")
    assert annealed.__name__ == "annealed"
    assert declared(annealed)["temperature"].range == "in (0, 2]"
    for wrong, message in (
        ({"temperature": 3}, r"annealed: temperature must be in \(0, 2\], found 3: write 1.0 for none\."),
        ({"temperature": None}, "annealed: temperature must be a number, found None"),
        ({"temperature": 1, "rounds": 0}, "annealed: rounds must be at least 1, found 0"),
        ({"temperature": 1, "kind": "wram"}, "annealed: kind must be one of .* did you mean 'warm'"),
        ({"temperature": 1, "ruonds": 0}, "annealed: unknown option 'ruonds', did you mean 'rounds'"),
        ({"problem": 3, "temperature": 1}, "annealed: problem must be an hg.Problem, found int: write hg.Problem"),
    ):
        with pytest.raises((hg.InputError, hg.InputTypeError), match=message):
            annealed(**{"problem": PROBLEM, **wrong})
    with pytest.raises(hg.InputTypeError, match=r"options: .*has no parameter 'y' to declare"):
        hg.options(y=hg.Number())(lambda x: x)
