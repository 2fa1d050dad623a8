r"""Options: how a factory declares what it takes, and how their numbers are passed on.

A factory declares each option in the line above itself, as a `Number`, a `Choice` or a `Slot`. The decorator `options`
checks the arguments of each call against the declaration before anything is compiled. It also stores the declaration on
the function, where `declared` and the tests read it. Defaults stand in the signature, as usual in Python.

Numbers that may change from call to call without recompiling are arrays in a solver's state (`as_options`).
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from hypergrad import _tree
from hypergrad._checks import check_choice, suggest_names
from hypergrad._solver import InputError, InputTypeError
from hypergrad._tree import PyTree, keystr

P = ParamSpec("P")
R = TypeVar("R")


class Option(Protocol):
    """The range of an option: a `Number`, a `Choice`, a `Slot`, or anything else that can check a value."""

    def check(self, function: str, name: str, value: Any) -> None:
        """Raise an `InputError` or `InputTypeError` that names function and option, unless the value is allowed."""
        ...


class Number(NamedTuple):
    """A finite number in a range. Declares an option of a factory, for `hg.options`.

    Attributes:
        least: smallest value.
        above: strict lower bound.
        most: largest value.
        below: strict upper bound.
        integer: whether it must be a whole number of an integer type.
        static: whether it must be known before anything is compiled: a Python or NumPy number, not a JAX array.
        every: whether it may be an array or a pytree of arrays, with every entry in the range.
        advice: end of the error message, which says what to write instead.

    >>> import hypergrad as hg
    >>> hg.Number(least=0, below=1).range
    'in [0, 1)'
    """

    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf
    below: float = math.inf
    integer: bool = False
    static: bool = False
    every: bool = False
    advice: str = ""

    @property
    def range(self) -> str:
        """The range in words; empty if every number is allowed."""
        low, high = max(self.least, self.above), min(self.most, self.below)
        closed, shut = self.least > self.above, self.most < self.below
        if math.isfinite(low) and math.isfinite(high):
            return f"in {'[' if closed else '('}{low:g}, {high:g}{']' if shut else ')'}"
        if math.isfinite(low):
            return f"{'at least' if closed else 'greater than'} {low:g}"
        return f"{'at most' if shut else 'less than'} {high:g}" if math.isfinite(high) else ""

    def check(self, function: str, name: str, value: Any) -> None:
        """Raise unless the value is a number in the range; traced values pass unless the number is static."""
        for path, leaf in jax.tree_util.tree_leaves_with_path(value) if self.every else [((), value)]:
            self._check(f"{function}: {name}{keystr(path)} must be", leaf)

    def _check(self, must_be: str, value: Any) -> None:
        traced, late = isinstance(value, Tracer), self.static and isinstance(value, jax.Array)
        kind = f"{'a Python' if late else 'an'} integer" if self.integer else "a number"
        advice = "its value must be known before anything is compiled" if late else self.advice
        advice = f": {advice}." if advice else "."
        number = isinstance(value, (int, float, np.generic, np.ndarray, jax.Array)) and not isinstance(value, bool)
        number = number and not late and (self.every or not np.ndim(value))
        number = number and jnp.issubdtype(jnp.result_type(value), jnp.integer if self.integer else jnp.number)
        if not number or jnp.issubdtype(jnp.result_type(value), jnp.complexfloating):
            raise InputTypeError(f"{must_be} {kind}, found {value!r}{advice}")
        if traced:
            return
        values = np.asarray(value).astype(float)
        low = (values >= self.least) & (values > self.above)
        wrong = ~(low & (values <= self.most) & (values < self.below))
        if np.any(wrong):
            first = values[wrong].flat[0]
            allowed = "finite" if np.isinf(first) else self.range or kind
            raise InputError(f"{must_be} {allowed}, found {f'{first:g}' if values.ndim else repr(value)}{advice}")


class Choice(NamedTuple):
    """One of several strings. Declares an option of a factory, for `hg.options`.

    Attributes:
        allowed: the strings.
    """

    allowed: tuple[str, ...]

    def check(self, function: str, name: str, value: Any) -> None:
        """Raise for any other value; the message names the nearest allowed one."""
        check_choice(function, name, value, self.allowed)


class Slot(NamedTuple):
    """An object of some kind, such as an inner solver. Declares an option of a factory, for `hg.options`.

    Attributes:
        kind: its type or types, or the names of functions that it must have.
        what: the kind in words, with an article.
        write: what the error message tells the caller to write.
        none: whether None is allowed, meaning that there is no such object.
    """

    kind: type | tuple[type, ...] | tuple[str, ...]
    what: str
    write: str
    none: bool = False

    def check(self, function: str, name: str, value: Any) -> None:
        """Raise for anything of another kind, and for a factory of the library that was not called."""
        kinds = self.kind if isinstance(self.kind, tuple) else (self.kind,)
        attributes = [kind for kind in kinds if isinstance(kind, str)]
        right = isinstance(value, tuple(kind for kind in kinds if isinstance(kind, type)))
        right |= bool(attributes) and all(callable(getattr(value, attribute, None)) for attribute in attributes)
        if (right and not hasattr(value, _DECLARED)) or (value is None and self.none):
            return
        raise InputTypeError(f"{function}: {name} must be {self.what}, found {_describe(value)}: write {self.write}.")


SOLVER = Slot(("init", "hypergrad", "response"), "an hg.Solver", "hg.implicit(problem), or another method")


def options(**declared: Option) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Declare the options of a factory, which are then checked in every call before it runs.

    An unknown keyword is refused as well, and the message names the nearest known one. The default itself is always
    allowed, so an option may be None only if that is its default.

    Args:
        **declared: an `hg.Number`, `hg.Choice` or `hg.Slot` for each option by its name.

    Returns:
        A decorator.

    Raises:
        InputTypeError: for a name that is not a parameter of the factory.

    >>> import hypergrad as hg
    >>> @hg.options(steps=hg.Number(least=1, integer=True))
    ... def my_solver(*, steps=10):
    ...     return steps
    >>> my_solver(steps=0)
    Traceback (most recent call last):
        ...
    hypergrad._solver.InputError: my_solver: steps must be at least 1, found 0.
    """

    def decorate(factory: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(factory)
        for name in declared:
            if name not in signature.parameters:
                raise InputTypeError(f"options: {factory.__name__} has no parameter {name!r} to declare.")

        @functools.wraps(factory)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                given = signature.bind_partial(*args, **kwargs).arguments
            except TypeError:  # Python's own message, from the call, names the function
                given = {}
            for name, value in given.items():
                if name in declared and value is not signature.parameters[name].default:
                    declared[name].check(factory.__name__, name, value)
            return factory(*args, **kwargs)

        setattr(checked, _DECLARED, dict(declared))
        return suggest_names(checked)

    return decorate


_DECLARED = "__options__"


def declared(factory: Callable[..., Any]) -> Mapping[str, Option]:
    """The options that a factory declares, by name."""
    return getattr(factory, _DECLARED, {})


def _describe(value: Any) -> str:
    name, module = getattr(value, "__name__", None), getattr(value, "__module__", None) or ""
    if inspect.isfunction(value) and module.startswith("hypergrad."):
        rooms = [room for room in module.split(".")[1:-1] if room not in ("solvers", "diagnostics")]
        path = ".".join(["hg", *rooms, value.__name__])
        needed = any(p.default is p.empty for p in inspect.signature(value).parameters.values())
        return f"the function {path} itself, which must be called, as in {path}({'...' if needed else ''})"
    if isinstance(value, str) or value is None:
        return repr(value)
    if callable(getattr(value, "init", None)) and callable(getattr(value, "update", None)):
        return "an optax optimizer"
    return f"the {'class' if inspect.isclass(value) else 'function'} {name}" if name else type(value).__name__


def default_tol(tol: ArrayLike | None, like: PyTree) -> Array:
    """A traced tolerance; None means what the precision supports: 1e-6 in float32, 1e-10 in float64."""
    if tol is None:
        eps = _tree.eps(like)
        tol = 1e-10 if eps < 1e-12 else 1e-6 if eps < 1e-5 else 1e-2
    return jnp.asarray(tol).astype(_tree.dtype(like))


def as_options(options: Mapping[str, ArrayLike | None], like: PyTree) -> dict[str, Array]:
    """Options as scalar arrays of fixed dtypes, so that a new value of any type fits the old trace.

    A tolerance of None becomes the default for the dtype of `like`.
    """

    def convert(name: str, value: ArrayLike | None) -> Array:
        if value is None or name == "tol":
            return default_tol(value, like)
        integer = jnp.issubdtype(jnp.result_type(value), jnp.integer)
        return jnp.asarray(value).astype(jnp.int32 if integer else _tree.dtype(like))

    return {name: convert(name, value) for name, value in options.items()}
