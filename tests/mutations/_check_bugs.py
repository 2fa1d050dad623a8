"""Wrong solvers that `hg.check` must refuse, and right ones that it must confirm.

A bug wraps the right call of a solver. All bugs of one problem are branches of one program, chosen by a number in the
solver's state, so that a problem is compiled once however many bugs there are. Each is tried in two forms: with the
solver's own `evaluate`, and as a bare triple of functions, whose outer loss is all that `hg.check` can compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import hypergrad as hg
from hypergrad._solver import Solver, evaluation

PyTree = Any


class Case(NamedTuple):
    """A right solver, and where to check it.

    Attributes:
        name: of problem and method.
        solver: the right one.
        problem: its two losses.
        residual: `(params, hparams, train)`: what is zero at the optimum, a pytree like params.
        params, hparams, train, valid, key: what `hg.check` is called with.
    """

    name: str
    solver: Solver
    problem: hg.Problem
    residual: Callable[..., PyTree]
    params: PyTree
    hparams: PyTree
    train: PyTree
    valid: PyTree
    key: Any = None

    def check(self, solver: Solver | None = None, **options: Any) -> Any:
        """The report on a solver in place of the right one."""
        solver = self.solver if solver is None else solver
        return hg.check(solver, self.params, self.hparams, self.train, self.valid, key=self.key, **options)


class Parts(NamedTuple):
    """What a bug may make a wrong hypergradient of; vectors over all entries of the hyperparameters.

    Attributes:
        total: the right one.
        direct: ∂f/∂λ at the solution.
        start: ∂f/∂λ at the first parameters.
        training: ∂/∂λ of the size of the training gradient, beside the solution.
        one_step: with the adjoint replaced by ∂f/∂w (T1-T2).
        damped: with the adjoint of a damped system.
        diagonal: with the adjoint of the Hessian's diagonal.
        hparams: λ.
        leaves: where each leaf lies, and its shape.
    """

    total: Any
    direct: Any
    start: Any
    training: Any
    one_step: Any
    damped: Any
    diagonal: Any
    hparams: Any
    leaves: tuple[tuple[slice, tuple[int, ...]], ...]


def _by_leaf(change: Callable[[Any], Any]) -> Callable[[Parts], Any]:
    def apply(p: Parts) -> Any:
        return jnp.concatenate([jnp.ravel(change(p.total[where].reshape(shape))) for where, shape in p.leaves])

    return apply


def _one_leaf(which: Callable[[Any], Any], factor: float) -> Callable[[Parts], Any]:
    """One leaf, chosen by the size of its hypergradient, times a factor."""

    def apply(p: Parts) -> Any:
        sizes = jnp.stack([jnp.sqrt(jnp.mean(p.total[where] ** 2)) for where, _ in p.leaves])
        chosen = which(sizes)
        factors = [jnp.full(where.stop - where.start, 1.0) for where, _ in p.leaves]
        return p.total * jnp.concatenate([jnp.where(chosen == i, factor * f, f) for i, f in enumerate(factors)])

    return apply


def _one_entry(which: Callable[[Any], Any], change: Callable[[Any], Any]) -> Callable[[Parts], Any]:
    def apply(p: Parts) -> Any:
        i = which(jnp.abs(p.total))
        return p.total.at[i].set(change(p.total[i]))

    return apply


def _swap(i: int, j: int) -> Callable[[Parts], Any]:
    return lambda p: p.total.at[jnp.asarray([i, j])].set(p.total[jnp.asarray([j, i])])


def _noise(p: Parts) -> Any:
    return jax.random.normal(jax.random.key(7), p.total.shape, p.total.dtype)


def _largest_kept(p: Parts) -> Any:
    size = jnp.abs(p.total)
    return jnp.where(size >= jnp.sort(size)[size.size // 2], p.total, 0)


# What becomes of the hypergradient. Each is a function of `Parts`.
GRADIENTS: dict[str, Callable[[Parts], Any]] = {
    "sign": lambda p: -p.total,
    "zero": lambda p: 0 * p.total,
    "twice as large": lambda p: 2 * p.total,
    "half as large": lambda p: p.total / 2,
    "two percent too large": lambda p: 1.02 * p.total,
    "a mean for a sum": lambda p: p.total / 20,
    "direct term dropped": lambda p: p.total - p.direct,
    "indirect term dropped": lambda p: p.direct,
    "direct term twice": lambda p: p.total + p.direct,
    "sign of the direct term": lambda p: p.total - 2 * p.direct,
    "sign of the indirect term": lambda p: 2 * p.direct - p.total,
    "indirect term twice": lambda p: 2 * p.total - p.direct,
    "sign of the smallest leaf": _one_leaf(jnp.argmin, -1.0),
    "sign of the largest leaf": _one_leaf(jnp.argmax, -1.0),
    "smallest leaf zero": _one_leaf(jnp.argmin, 0.0),
    "smallest leaf twice as large": _one_leaf(jnp.argmin, 2.0),
    "largest leaf five percent too small": _one_leaf(jnp.argmax, 0.95),
    "sign of the largest entry": _one_entry(jnp.argmax, lambda x: -x),
    "sign of the smallest entry": _one_entry(jnp.argmin, lambda x: -x),
    "sign of the first entry": _one_entry(lambda size: 0, lambda x: -x),
    "largest entry zero": _one_entry(jnp.argmax, lambda x: 0 * x),
    "smallest entry zero": _one_entry(jnp.argmin, lambda x: 0 * x),
    "an entry NaN": _one_entry(jnp.argmin, lambda x: x * jnp.nan),
    "an entry infinite": _one_entry(jnp.argmax, lambda x: x * jnp.inf),
    "sign of every other entry": lambda p: p.total * (1 - 2 * (jnp.arange(p.total.size) % 2)),
    "first two entries exchanged": _swap(0, 1),
    "last two entries exchanged": _swap(-1, -2),
    "first and last entries exchanged": _swap(0, -1),
    "shifted by one": lambda p: jnp.roll(p.total, 1),
    "each leaf shifted by one": _by_leaf(lambda x: jnp.roll(jnp.ravel(x), 1)),
    "each leaf reversed": _by_leaf(lambda x: jnp.ravel(x)[::-1]),
    "each leaf transposed, vectors shifted": _by_leaf(lambda x: x.T if x.ndim > 1 else jnp.roll(x, 2)),
    "order of the leaves": lambda p: jnp.concatenate([p.total[where] for where, _ in p.leaves[::-1]]),
    "absolute value": lambda p: jnp.abs(p.total),
    "signs alone": lambda p: jnp.sign(p.total),
    "normalised": lambda p: p.total / jnp.linalg.norm(p.total),
    "clipped by its norm": lambda p: 0.9 * p.total,
    "clipped entry by entry": lambda p: jnp.clip(p.total, *(jnp.median(jnp.abs(p.total)) * jnp.asarray([-1, 1]))),
    "rounded to bfloat16": lambda p: p.total.astype(jnp.bfloat16).astype(p.total.dtype),
    "rounded to float16": lambda p: p.total.astype(jnp.float16).astype(p.total.dtype),
    "rounded to two decimals": lambda p: jnp.round(p.total, 2),
    "smaller half of the entries zero": _largest_kept,
    "the mean in every entry": _by_leaf(lambda x: jnp.full_like(x, 1) * jnp.mean(x) + 0.01 * jnp.max(jnp.abs(x))),
    "neighbours averaged": lambda p: (p.total + jnp.roll(p.total, 1)) / 2,
    "summed up": lambda p: jnp.cumsum(p.total),
    "squared": lambda p: p.total**2,
    "first entry alone": lambda p: p.total.at[1:].set(0),
    "derivative of a decay of λ added": lambda p: p.total + 0.1 * p.hparams,
    "derivative of a prior on λ subtracted": lambda p: p.total - 0.01 * p.hparams,
    "in other coordinates: times λ": lambda p: p.total * p.hparams,
    "in other coordinates: times exp(λ)": lambda p: p.total * jnp.exp(p.hparams),
    "in other coordinates: over λ": lambda p: p.total / p.hparams,
    "five percent of noise": lambda p: p.total * (1 + 0.05 * _noise(p)),
    "noise as large in every entry": lambda p: p.total + 0.02 * jnp.linalg.norm(p.total) * _noise(p),
    "of the start": lambda p: p.start,
    "of the training loss": lambda p: p.training,
    "of the training loss added": lambda p: p.total + p.training,
    "T1-T2": lambda p: p.one_step,
    "a damped adjoint": lambda p: p.damped,
    "the diagonal of the Hessian": lambda p: p.diagonal,
}
# What a solver is given, or returns, that is wrong beside the hypergradient; handled in `planted`.
STALE, ON_VALID, ON_TRAIN, HALF_TRAIN, HALF_VALID, UNTRAINED, ELSEWHERE, OTHER_VALUE = (
    "hyperparameters of the call before",
    "trained on the validation data",
    "validated on the training data",
    "first half of the training rows",
    "first half of the validation rows",
    "never trained",
    "hypergradient at other hyperparameters",
    "outer loss of other hyperparameters",
)
INPUTS = (STALE, ON_VALID, ON_TRAIN, HALF_TRAIN, HALF_VALID, UNTRAINED, ELSEWHERE, OTHER_VALUE)
BUGS = (*GRADIENTS, *INPUTS)
RIGHT = -1


class PlantedState(NamedTuple):
    """The right solver's state, with the number of the bug.

    Attributes:
        bug: its number, or `RIGHT`.
        inner: of the right solver.
        options: of the right solver, where `hg.check` looks for them.
        start: the first parameters.
        before: hyperparameters of the call before.
    """

    bug: Any
    inner: Any
    options: Any
    start: PyTree
    before: PyTree


def planted(case: Case, bugs: Sequence[str] = BUGS) -> Callable[..., Solver]:
    """`(bug, bare=False) -> Solver`: one program for all these bugs of a case."""
    right, problem = case.solver, case.problem
    evaluate_right, init_right = evaluation(right), jax.jit(right.init)  # a check begins some fifty times
    changes = [name for name in bugs if name in GRADIENTS]
    names = [*changes, *INPUTS]

    def inner_of(state: PlantedState) -> Any:
        return state.inner._replace(options=state.options)

    def is_bug(state: PlantedState, name: str) -> Any:
        return state.bug == names.index(name)

    def parts(w: PyTree, start: PyTree, h: PyTree, train: PyTree, valid: PyTree, grad: PyTree) -> Parts:
        vector = lambda tree: ravel_pytree(tree)[0]
        rhs, direct = jax.grad(problem.outer_loss, argnums=(0, 1))(w, h, valid)
        flat, unravel = ravel_pytree(w)
        residual = lambda w, h: vector(case.residual(unravel(w), h, train))
        jacobian = jax.jacobian(residual)(flat, h)
        _, pull = jax.vjp(lambda h: residual(flat, h), h)
        through = lambda v: vector(direct) - vector(pull(v)[0])
        size = jnp.linalg.norm(jacobian)
        moved = jax.tree.map(lambda x: x + 0.1, w)
        shifted = jacobian.T + 0.1 * size * jnp.eye(flat.size)
        training = jax.grad(lambda h: sum(jnp.sum(x**2) for x in jax.tree.leaves(case.residual(moved, h, train))))(h)
        leaves, begin = [], 0
        for leaf in jax.tree.leaves(h):
            leaves.append((slice(begin, begin + leaf.size), leaf.shape))
            begin += leaf.size
        return Parts(
            total=vector(grad),
            direct=vector(direct),
            start=vector(jax.grad(problem.outer_loss, argnums=1)(start, h, valid)),
            training=vector(training),
            one_step=through(vector(rhs) / size),
            damped=through(jnp.linalg.solve(shifted, vector(rhs))),
            diagonal=through(vector(rhs) / jnp.diag(jacobian)),
            hparams=vector(h),
            leaves=tuple(leaves),
        )

    def half(condition: Any, data: PyTree) -> PyTree:
        def change(x: Any) -> Any:
            count = x.shape[0] // 2
            return jnp.where(condition, x.at[x.shape[0] - count :].set(x[:count]), x)

        return jax.tree.map(change, data)

    def either(condition: Any, a: PyTree, b: PyTree) -> PyTree:
        return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)

    def hypergrad(state: PlantedState, hparams: PyTree, train: Any = None, valid: Any = None, *, key: Any = None):
        h = jax.tree.map(jnp.asarray, hparams)
        used = either(is_bug(state, STALE), state.before, h)
        used = either(is_bug(state, ELSEWHERE), jax.tree.map(lambda x: 1.03 * x, used), used)
        reads = either(is_bug(state, ON_VALID), valid, train)
        validates = either(is_bug(state, ON_TRAIN), train, valid)
        reads, validates = half(is_bug(state, HALF_TRAIN), reads), half(is_bug(state, HALF_VALID), validates)
        out, inner = right.hypergrad(inner_of(state), used, reads, validates, key=key)
        w = right.response(inner, h)
        p = parts(w, state.start, h, train, valid, out.grad)
        unravel = ravel_pytree(h)[1]
        branches = [lambda name=name: GRADIENTS[name](p).astype(p.total.dtype) for name in changes]
        is_changed = (state.bug >= 0) & (state.bug < len(branches))
        grad = jax.lax.switch(jnp.where(is_changed, state.bug, len(branches)), [*branches, lambda: p.total])
        untrained = is_bug(state, UNTRAINED)
        grad = jnp.where(untrained, p.start, grad)
        start_value = problem.outer_loss(state.start, h, valid)
        other = problem.outer_loss(w, jax.tree.map(lambda x: 1.5 * x, h), valid)
        value = jnp.where(untrained, start_value, jnp.where(is_bug(state, OTHER_VALUE), other, out.value))
        # Where only the hypergradient is of other hyperparameters, the outer loss is that of the given ones.
        elsewhere = problem.outer_loss(w, h, valid)
        value = jnp.where(is_bug(state, ELSEWHERE), elsewhere, value).astype(out.value.dtype)
        return out._replace(value=value, grad=unravel(grad)), state._replace(inner=inner, before=h)

    def response(state: PlantedState, hparams: PyTree) -> PyTree:
        return either(is_bug(state, UNTRAINED), state.start, right.response(state.inner, hparams))

    def evaluate(state: PlantedState, hparams: PyTree, train: Any = None, valid: Any = None, *, key: Any = None):
        value, info, inner = evaluate_right(inner_of(state), hparams, train, valid, key=key)
        return value, info, state._replace(inner=inner)

    def solver(bug: str | None, bare: bool = False) -> Solver:
        number = RIGHT if bug is None else names.index(bug)

        def init(params: PyTree, hparams: PyTree, *, key: Any = None, model_state: PyTree = None) -> PlantedState:
            inner = init_right(params, hparams, key=key, model_state=model_state)
            h = jax.tree.map(jnp.asarray, hparams)
            return PlantedState(jnp.int32(number), inner, inner.options, params, h)

        if bare:
            return Solver(init, hypergrad, response)
        return Solver(init, hypergrad, response, evaluate, right.about)

    return solver


def error_of(case: Case, solver: Solver) -> float:
    """How wrong the first hypergradient is in its worst leaf, relative to the leaf; infinite for wrong values."""

    def first(solver: Solver) -> tuple[float, list[np.ndarray]]:
        state = solver.init(case.params, case.hparams)
        out, _ = jax.jit(solver.hypergrad)(state, case.hparams, case.train, case.valid)
        return float(out.value), [np.asarray(x, np.float64) for x in jax.tree.leaves(out.grad)]

    (value, ours), (right, theirs) = first(solver), first(case.solver)
    if abs(value - right) > 1e-3 * abs(right):
        return np.inf
    errors = [np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-300) for a, b in zip(ours, theirs, strict=True)]
    return float(np.max(np.nan_to_num(errors, nan=np.inf)))  # `max` alone overlooks a NaN behind a number


# Problems ------------------------------------------------------------------------------------------------------------


def arrays(*xs: Any, dtype: Any) -> tuple[Any, ...]:
    return tuple(jnp.asarray(x, dtype) for x in xs)


def regression(rng: np.random.Generator, rows: int, d: int, dtype: Any) -> tuple[Any, Any]:
    w = rng.normal(size=d)
    x = [rng.normal(size=(rows, d)) * np.logspace(0, -0.5, d) for _ in range(2)]
    train, valid = (arrays(a, a @ w + 0.5 * rng.normal(size=rows), dtype=dtype) for a in x)
    return train, valid


def ridge_loss(w: Any, h: Any, batch: Any) -> Any:
    x, y = batch
    return jnp.mean((x @ w - y) ** 2) + jnp.sum(jnp.exp(h["l2"]) * w**2)


def ridge_outer(w: Any, h: Any, batch: Any) -> Any:
    """With a leaf whose hypergradient is near 1e-5 of the others'."""
    x, y = batch
    return jnp.mean((x @ w + 0.3 * h["shift"] - y) ** 2) + 0.05 * jnp.sum(h["l2"] ** 2) + 1e-5 * jnp.sin(h["small"])


def ridge_hparams(rng: np.random.Generator, dtype: Any) -> PyTree:
    l2, shift, small = arrays(rng.uniform(-2, -0.3, 5), rng.uniform(0.4, 0.9), rng.uniform(0.2, 0.6), dtype=dtype)
    return {"l2": l2, "shift": shift, "small": small}


def _cross_entropy(logits: Any, labels: Any) -> Any:
    return jnp.mean(jax.nn.logsumexp(logits, -1) - jnp.sum(logits * labels, -1))


def softmax_loss(w: Any, h: Any, batch: Any) -> Any:
    x, labels = batch
    return _cross_entropy(x @ w, labels) + jnp.sum(jnp.exp(h["decay"]) * w**2)


def softmax_outer(w: Any, h: Any, batch: Any) -> Any:
    x, labels = batch
    return _cross_entropy(jnp.exp(h["heat"]) * (x @ w), labels) + 0.01 * jnp.sum(jnp.cos(h["decay"]))


def labelled(rng: np.random.Generator, rows: int, d: int, classes: int, dtype: Any) -> tuple[Any, Any]:
    w = rng.normal(size=(d, classes))
    x = [rng.normal(size=(rows, d)) for _ in range(2)]
    labels = [np.eye(classes)[np.argmax(a @ w + rng.gumbel(size=(rows, classes)), -1)] for a in x]
    train, valid = (arrays(a, b, dtype=dtype) for a, b in zip(x, labels, strict=True))
    return train, valid


def softmax_hparams(rng: np.random.Generator, dtype: Any) -> PyTree:
    decay, heat = arrays(rng.uniform(-3, -1, (3, 3)), rng.uniform(0.2, 0.5), dtype=dtype)
    return {"decay": decay, "heat": heat}


def trained_loss(w: Any, h: Any, batch: Any) -> Any:
    x, y = batch
    return jnp.mean((x @ w - y) ** 2) + jnp.exp(h["l2"]) * jnp.sum(w**2)


def trained_outer(w: Any, h: Any, batch: Any) -> Any:
    x, y = batch
    return jnp.mean((x @ w - y) ** 2) + 0.02 * jnp.sum(h["rates"] ** 2) + 0.01 * h["momentum"] ** 2


def schedule(h: Any) -> Any:
    """Plain descent with momentum, a rate for each third of the run."""

    def init(params: Any) -> Any:
        return jax.tree.map(jnp.zeros_like, params), jnp.zeros((), jnp.int32)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        trace, count = state
        trace = jax.tree.map(lambda m, g: h["momentum"] * m + g, trace, updates)
        rate = h["rates"][jnp.minimum(count // 5, h["rates"].size - 1)]
        return jax.tree.map(lambda m: -rate * m, trace), (trace, count + 1)

    return optax.GradientTransformation(init, update)


def trained_hparams(rng: np.random.Generator, dtype: Any) -> PyTree:
    rates, momentum, l2 = arrays(rng.uniform(0.05, 0.15, 3), rng.uniform(0.3, 0.6), rng.uniform(-3, -1), dtype=dtype)
    return {"rates": rates, "momentum": momentum, "l2": l2}


def equilibrium(w: Any, h: Any, batch: Any) -> Any:
    """w = tanh(A w + b), with a matrix that the data scale."""
    x, y = batch
    return jnp.tanh(0.25 * jnp.exp(h["scale"]) * (x.T @ x / x.shape[0]) @ w + x.T @ y / x.shape[0] + h["bias"])


def equilibrium_outer(w: Any, h: Any, batch: Any) -> Any:
    x, y = batch
    return jnp.mean((x @ w - y) ** 2) + 0.05 * jnp.sum(h["bias"] ** 2) + 0.01 * jnp.sin(h["scale"])


def equilibrium_hparams(rng: np.random.Generator, dtype: Any) -> PyTree:
    bias, scale = arrays(rng.uniform(0.1, 0.5, 4), rng.uniform(-0.5, -0.2), dtype=dtype)
    return {"bias": bias, "scale": scale}


def network_loss(w: Any, h: Any, batch: Any) -> Any:
    x, y = batch
    error = jnp.mean((jnp.tanh(x @ w["in"]) @ w["out"] - y) ** 2)
    return error + jnp.sum(jnp.exp(h[0])[:, None] * w["in"] ** 2) + jnp.exp(h[1]) * jnp.sum(w["out"] ** 2)


def network_outer(w: Any, h: Any, batch: Any) -> Any:
    x, y = batch
    return jnp.mean((jnp.tanh(x @ w["in"]) @ w["out"] - y) ** 2) + 0.01 * jnp.sum(h[0] ** 2) + 0.02 * jnp.sin(h[1])


def network_params(rng: np.random.Generator, dtype: Any) -> PyTree:
    first, last = arrays(rng.normal(size=(3, 4)), rng.normal(size=4), dtype=dtype)
    return {"in": first, "out": last}


def network_hparams(rng: np.random.Generator, dtype: Any) -> PyTree:
    return arrays(rng.uniform(-4, -2.5, 3), rng.uniform(-4, -2.5), dtype=dtype)


RIDGE = hg.Problem(ridge_loss, ridge_outer)
SOFTMAX = hg.Problem(softmax_loss, softmax_outer)
TRAINED = hg.Problem(trained_loss, trained_outer)
EQUILIBRIUM = hg.Problem(None, equilibrium_outer)
NETWORK = hg.Problem(network_loss, network_outer)
_GRADS = {loss: jax.grad(loss) for loss in (ridge_loss, softmax_loss, trained_loss, network_loss)}
SOLVERS: dict[str, Solver] = {
    "ridge": hg.implicit(RIDGE),
    "softmax": hg.implicit(SOFTMAX),
    "trained": hg.unrolled(TRAINED, inner=hg.inner.gradient(schedule, steps=15)),
    "equilibrium": hg.implicit(
        EQUILIBRIUM, inner=hg.inner.fixed_point(equilibrium, tol=1e-6, max_steps=500), linear=hg.linear.gmres()
    ),
    "network": hg.implicit(NETWORK, linear=hg.linear.dense()),
}


def cases(seed: int = 0, dtype: Any = None) -> Iterator[Case]:
    """Five problems with closed forms, convex and not, solved to an optimum, to a fixed point, and trained."""
    dtype = dtype or jnp.result_type(float)
    for i, name in enumerate(SOLVERS):
        rng = np.random.default_rng([seed, i])
        solver = SOLVERS[name]
        if name == "ridge":
            data = regression(rng, 20, 5, dtype)
            yield Case(name, solver, RIDGE, _GRADS[ridge_loss], jnp.zeros(5, dtype), ridge_hparams(rng, dtype), *data)
        elif name == "softmax":
            data = labelled(rng, 20, 3, 3, dtype)
            start, h = jnp.zeros((3, 3), dtype), softmax_hparams(rng, dtype)
            yield Case(name, solver, SOFTMAX, _GRADS[softmax_loss], start, h, *data)
        elif name == "trained":
            data = regression(rng, 20, 4, dtype)
            start, h = jnp.zeros(4, dtype), trained_hparams(rng, dtype)
            yield Case(name, solver, TRAINED, _GRADS[trained_loss], start, h, *data)
        elif name == "equilibrium":
            data = regression(rng, 20, 4, dtype)
            start, h = jnp.zeros(4, dtype), equilibrium_hparams(rng, dtype)
            yield Case(name, solver, EQUILIBRIUM, lambda w, h, b: w - equilibrium(w, h, b), start, h, *data)
        else:
            data = regression(rng, 20, 3, dtype)
            start, h = network_params(rng, dtype), network_hparams(rng, dtype)
            yield Case(name, solver, NETWORK, _GRADS[network_loss], start, h, *data)
