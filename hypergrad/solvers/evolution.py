r"""Evolution strategies: antithetic hypergradients along a training run, from values of the outer loss alone.

    L±_i = mean of f over the steps of this call, at u ± σε_i, from the point where the particle i± stands
    g = (1/n) Σ_i ξ_i (L⁺_i − L⁻_i) / 2σ²

where u are the unconstrained hyperparameters and ξ_i is

    es     σ ε_i, drawn at every call; both particles start where training without perturbation stands
    pes    the sum of all σ ε_i since the episode began; particles go on from where they stand
    nres   σ ε_i, drawn once an episode; particles go on from where they stand

Nothing is differentiated with respect to hyperparameters: losses may count errors, round, or sort by them, and training
that explodes gives a large difference instead of a derivative of 10³⁰. With `truncate`, es is biased, because it sees
the hyperparameters' influence within one call only; pes and nres are unbiased over the calls of an episode.

Source: PES: Vicol, Metz & Sohl-Dickstein 2021, arXiv:2112.13835. NRES: Li et al. 2023, arXiv:2304.12180. ES: Salimans
et al. 2017, arXiv:1703.03864. Differs: a pair whose loss is not finite is left out until its episode ends.
Cost of a call: 2n + 1 times `truncate` training steps, side by side; with `truncate`, as many evaluations of the outer
loss. Memory: 2n + 1 times the parameters and the state of the optimizer, regardless of the length of the run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from hypergrad import _tree
from hypergrad._checks import check_hparams, check_params, spread
from hypergrad._options import Choice, Number, as_options, options
from hypergrad._problem import PROBLEM, Objective, Problem, bind_inner, bind_outer, reparametrized
from hypergrad._solver import About, Hypergradient, Info, InputError, Solver, Status, code, first_failure
from hypergrad._tree import PyTree
from hypergrad.domains._domain import to_constrained, to_unconstrained
from hypergrad.inner._inner import STEPS, Inner
from hypergrad.solvers._call import (
    bad_grad,
    bad_loss,
    bind,
    finite_or,
    framed,
    no_influence,
    option_names,
    report,
    require_key,
)
from hypergrad.solvers.unrolled import unrolled
from hypergrad.unrolling.step import Point, like


class EvolutionState(NamedTuple):
    """The state from which the next call starts.

    Attributes:
        centre: where the run without perturbation stands.
        particles: where the perturbed runs stand; leaves `[2, pairs, ...]`, with u + σε first.
        drift: ξ, leaves `[pairs, ...]`, like the unconstrained hyperparameters.
        alive: which pairs have had finite losses since their episode began, `[pairs]`.
        clock: steps since the episode began, int32.
        start: parameters and model state with which an episode begins.
        gradients: state of `hg.unrolled` for the hyperparameters that follow gradients, or None.
        options: `{"scale": ...}`, which may be replaced between calls without recompiling.
    """

    centre: Point
    particles: Point
    drift: PyTree
    alive: Array
    clock: Array
    start: tuple[PyTree, PyTree]
    gradients: Any
    options: dict[str, Any]

    @property
    def params(self) -> PyTree:
        """Parameters of the run without perturbation."""
        return self.centre.params


@options(
    problem=PROBLEM,
    inner=STEPS,
    method=Choice(("es", "pes", "nres")),
    scale=Number(above=0),
    pairs=Number(least=1, integer=True, static=True),
    truncate=Number(least=1, integer=True, static=True),
)
def evolution(
    problem: Problem,
    *,
    inner: Inner,
    method: str = "pes",
    scale: ArrayLike = 0.1,
    pairs: int = 16,
    truncate: int | None = None,
    domain: PyTree = None,
    evolve: PyTree = None,
) -> Solver:
    """Hypergradients without derivatives, by perturbing the hyperparameters of parallel runs of training.

    Use it for hyperparameters in which a loss is flat, jumps or counts, and for training that is too long or too
    chaotic to be differentiated. Where a derivative exists, `hg.unrolled` and `hg.implicit` are exact, and cheaper by a
    factor of the number of pairs.

    Args:
        problem: the two losses. The inner loss needs a derivative in the parameters, the outer loss none at all.
        inner: one episode of training, and its number of steps: `hg.inner.gradient(optimizer, steps=1000)`, or
            `hg.inner.fixed_point(map, steps=1000)`. An optimizer given as a function of `hparams` is tuned too.
        method: `"pes"` and `"nres"` are unbiased with `truncate`; nres has less variance where the influence of a
            perturbation lasts. `"es"` equals both of them without `truncate`, and is biased with it.
        scale: σ, standard deviation of the perturbations in unconstrained coordinates (a tenth is a tenth of `u`, not
            of λ). What is estimated is the derivative of the outer loss smoothed over perturbations of this size.
        pairs: n, antithetic pairs of runs.
        truncate: training steps per call, a divisor of the steps of `inner`. The outer loss is then averaged over all
            steps of an episode. None: a call is a whole episode, and the outer loss is the one at its end.
        domain: pytree prefix of `hparams` with `hg.domains` as leaves; pass the same one to `hg.tune`.
        evolve: pytree prefix of bools. Where it is False, a hyperparameter follows the gradient of `hg.unrolled`
            instead, in the same call; this needs whole episodes. None: all of them evolve.

    Returns:
        A `Solver` that needs `key=` in every call. `info.error_estimate` is the standard error of the mean over pairs
        relative to the hypergradient, infinite above 1 and for a single pair; it does not count what smoothing changes,
        nor, for `"es"`, truncation. `info.extra["pairs"]` is the number of pairs that entered the mean. `out.value` is
        the outer loss of a run without perturbation, and `response` its parameters, which with `truncate` are those in
        the middle of an episode.

    Raises:
        InputError: for options out of range, an inner solver without a number of steps, `truncate` that does not divide
            them, `evolve` with `truncate`, and an `evolve` that leaves nothing to evolve; from `init` and `hypergrad`,
            for a missing key, and hyperparameters outside of their domain.

    >>> import hypergrad as hg, jax, jax.numpy as jnp, optax
    >>> problem = hg.Problem(lambda w, lr, batch: 0.5 * jnp.sum(w**2), lambda w, lr, batch: jnp.sum(w))
    >>> inner = hg.inner.gradient(lambda lr: optax.sgd(lr), steps=3)
    >>> solver = hg.evolution(problem, inner=inner, scale=0.01, pairs=1000)
    >>> state = solver.init(jnp.ones(1), 0.5)
    >>> out, state = jax.jit(solver.hypergrad)(state, 0.5, key=jax.random.key(0))
    >>> print(f"{out.value:.3f}", bool(abs(out.grad + 0.75) < 0.1))  # w = (1 - lr)^3, dw/dlr = -3 (1 - lr)^2
    0.125 True
    """
    length = _length(inner, truncate)
    about = About(
        "hg.evolution",
        "path",
        random=("perturbations of the hyperparameters",),
        biases=("truncation of each perturbation's influence to one call",) if method == "es" and truncate else (),
        options=option_names({"scale": scale}),
        trains_on=truncate is not None,
    )
    _check_evolve(evolve, truncate)

    def init(
        params: PyTree, hparams: PyTree, *, key: Array | None = None, model_state: PyTree = None
    ) -> EvolutionState:
        del key
        params, hparams = check_params(params), check_hparams(hparams)
        free, start = _tree.strong(to_unconstrained(domain, hparams)), (params, _tree.strong(model_state))
        centre, gradients = _begin(inner, start, hparams), None
        if evolve is not None:
            hybrid = _hybrid(problem, inner, evolve, hparams)
            gradients = hybrid.solver.init(params, hybrid.rest(hparams), model_state=model_state)
        every = lambda *axes: lambda x: jnp.broadcast_to(x, (*axes, *jnp.shape(x)))
        return EvolutionState(
            centre,
            jax.tree.map(every(2, pairs), centre),
            jax.tree.map(every(pairs), _tree.zeros_like(free)),  # sharded as the hyperparameters are
            jnp.ones(pairs, bool),
            jnp.int32(0),
            start,
            gradients,
            as_options({"scale": scale}, free),
        )

    def run(point: Point, hparams: PyTree, train: PyTree, valid: PyTree, keys: Any) -> tuple[Point, Array, Any]:
        """Take some training steps from a point; return the end point, the outer loss on the way, and its metrics."""
        train_key, valid_key = keys
        objective = bind_inner(problem, train, train_key, point.model_state)
        outer = lambda at: bind_outer(problem, valid, valid_key, at.model_state)(at.params, hparams)

        def one(c: tuple[Point, Array], t: Any) -> tuple[tuple[Point, Array], None]:
            at, total = c
            at = _advance(inner, objective, at, hparams, t)
            return (at, total if truncate is None else total + outer(at)[0].astype(total.dtype)), None

        zero = jnp.zeros((), jax.eval_shape(outer, point)[0].dtype)
        (point, total), _ = jax.lax.scan(one, (point, zero), jnp.arange(length))
        value, metrics = outer(point)
        return point, value if truncate is None else total / length, metrics

    def begin(state: EvolutionState, hparams: PyTree) -> tuple[Point, Array]:
        """Return where this call starts without perturbation, and whether an episode starts with it."""
        new = (state.clock == 0) | (state.clock >= (inner.steps or 0))
        return _tree.where(new, _begin(inner, state.start, hparams), state.centre), new

    def hypergrad(
        state: EvolutionState,
        hparams: PyTree,
        train: PyTree = None,
        valid: PyTree = None,
        *,
        key: Array | None = None,
    ) -> tuple[Hypergradient, EvolutionState]:
        key = require_key("evolution", "hypergrad", key, "perturbations of the hyperparameters")
        call = bind(problem, state.start[1], hparams, train, valid, key, own_keys=2)
        hparams, (noise_key, train_key) = call.hparams, call.keys
        free, pull = jax.vjp(lambda h: _tree.strong(to_unconstrained(domain, h)), hparams)
        centre, new = begin(state, hparams)
        sigma = state.options["scale"]

        fresh = _mask(evolve, _tree.scale(sigma, _normal(noise_key, state.drift)))
        drift = _drift(method, new, state.drift, fresh)
        off = drift if method == "nres" else fresh  # how far the hyperparameters are moved in this call

        def particle(sign: Array, stands: Point, off: PyTree, key: Array) -> tuple[Point, Array]:
            moved = to_constrained(domain, _tree.axpy(sign, off, free))
            moved = jax.tree.map(lambda x, h: x.astype(h.dtype), moved, hparams)
            begins = centre if method == "es" else _tree.where(new, _begin(inner, state.start, moved), stands)
            return run(begins, moved, train, valid, (key, call.outer_key))[:2]

        signs, keys = jnp.asarray([1, -1], sigma.dtype), jax.random.split(train_key, pairs + 1)
        both = jax.vmap(jax.vmap(particle, (None, 0, 0, 0)), (0, 0, None, None))
        particles, losses = both(signs, state.particles, off, keys[1:])
        alive = (new | state.alive | (method == "es")) & jnp.isfinite(losses).all(0)
        difference = jnp.where(alive, losses[0] - losses[1], 0) / (2 * sigma**2)
        each = jax.tree.map(lambda d: d * _along(difference, d).astype(d.dtype), drift)
        count = jnp.sum(alive)
        mean = jax.tree.map(lambda x: jnp.sum(x, 0) / jnp.maximum(count, 1).astype(x.dtype), each)
        (grad,) = pull(mean)

        gradients = state.gradients
        if evolve is None:
            centre, value, metrics = run(centre, hparams, train, valid, (keys[0], call.outer_key))
        else:
            hybrid = _hybrid(problem, inner, evolve, hparams)
            out, gradients = hybrid.solver.hypergrad(gradients, hybrid.rest(hparams), train, valid, key=key)
            grad, value, metrics = hybrid.merge(grad, out.grad), out.value, out.metrics
            centre = Point(gradients.params, gradients.inner_state, gradients.model_state)

        status = first_failure(
            bad_loss(value),
            code(count == 0, Status.NONFINITE_LOSS),
            bad_grad(grad),
            no_influence(grad),
        )
        info = report(status, length, like=value, error_estimate=_spread(each, mean, alive), extra={"pairs": count})
        clock = jnp.where(count == 0, inner.steps or 0, jnp.where(new, 0, state.clock) + length)  # or start again
        state = state._replace(
            centre=finite_or(centre, state.centre),
            particles=_kept(alive, particles, state.particles),
            drift=drift,
            alive=alive,
            clock=clock.astype(jnp.int32),
            gradients=gradients,
        )
        return Hypergradient(value, grad, info, metrics), state

    def evaluate(
        state: EvolutionState,
        hparams: PyTree,
        train: PyTree = None,
        valid: PyTree = None,
        *,
        key: Array | None = None,
    ) -> tuple[Array, Info, EvolutionState]:
        call = bind(problem, state.start[1], hparams, train, valid, key, own_keys=2)
        centre, new = begin(state, call.hparams)
        end, value, _ = run(centre, call.hparams, train, valid, (call.keys[1], call.outer_key))
        clock = (jnp.where(new, 0, state.clock) + length).astype(jnp.int32)
        info = report(first_failure(bad_loss(value)), length, like=value)
        return value, info, state._replace(centre=finite_or(end, state.centre), clock=clock)

    return framed(init, hypergrad, lambda state, hparams: state.params, evaluate, about)


def _length(inner: Inner, truncate: int | None) -> int:
    """Training steps of a call."""
    if inner.steps is None or (inner.update is None and inner.move is None):
        raise InputError(
            "evolution: inner must be a number of training steps, found a solver to a tolerance: write "
            "hg.inner.gradient(optimizer, steps=100) or hg.inner.fixed_point(map, steps=100)."
        )
    if inner.steps == 0 or (truncate is not None and inner.steps % truncate):
        raise InputError(
            f"evolution: truncate must divide the {inner.steps} steps of inner, so that an episode is a number of "
            f"calls, found {truncate}."
        )
    return inner.steps if truncate is None else int(truncate)


def _check_evolve(evolve: PyTree, truncate: int | None) -> None:
    if evolve is None:
        return
    if truncate is not None:
        raise InputError(
            "evolution: hyperparameters that follow gradients need whole episodes: leave out truncate, or evolve."
        )
    flags = jax.tree.leaves(evolve)
    if not all(isinstance(flag, bool) for flag in flags) or not any(flags):
        raise InputError(
            "evolution: evolve must be a pytree prefix of hparams whose leaves are True or False, at least one of them "
            f"True, found {evolve!r}: where nothing evolves use hg.unrolled."
        )


def _flags(evolve: PyTree, hparams: PyTree) -> list[bool]:
    """Which leaves of the hyperparameters evolve."""
    return jax.tree.leaves(spread("evolution", "evolve", evolve, hparams))


def _mask(evolve: PyTree, draws: PyTree) -> PyTree:
    """Set draws to zero where a hyperparameter does not evolve."""
    if evolve is None:
        return draws
    leaves, treedef = jax.tree.flatten(draws)
    kept = zip(_flags(evolve, draws), leaves, strict=True)
    return treedef.unflatten([leaf if flag else jnp.zeros_like(leaf) for flag, leaf in kept])


class _Hybrid(NamedTuple):
    """`hg.unrolled` over those hyperparameters that do not evolve, a list of leaves.

    Attributes:
        solver: the unrolled solver of these hyperparameters.
        rest: selects these hyperparameters.
        merge: `(evolving, rest) -> hparams`; the first is a pytree without the leaves that do not evolve.
    """

    solver: Solver
    rest: Callable[[PyTree], list[Array]]
    merge: Callable[[PyTree, list[Array]], PyTree]


def _hybrid(problem: Problem, inner: Inner, evolve: PyTree, hparams: PyTree) -> _Hybrid:
    flags, treedef = _flags(evolve, hparams), jax.tree.structure(hparams)

    def rest(hparams: PyTree) -> list[Array]:
        return [leaf for flag, leaf in zip(flags, jax.tree.leaves(hparams), strict=True) if not flag]

    def merge(evolving: PyTree, rest: list[Array]) -> PyTree:
        left = iter(rest)
        leaves = zip(flags, jax.tree.leaves(evolving), strict=True)
        return treedef.unflatten([leaf if flag else next(left) for flag, leaf in leaves])

    whole = lambda rest: merge(hparams, rest)
    move, update = inner.move, inner.update
    steps = inner._replace(
        init=lambda params, rest: inner.init(params, whole(rest)),
        residual=lambda objective, params, rest: inner.residual(objective, params, whole(rest)),
        update=update and (lambda grads, params, state, rest, *more: update(grads, params, state, whole(rest), *more)),
        move=move and (lambda objective, params, state, rest, t: move(objective, params, state, whole(rest), t)),
    )
    return _Hybrid(unrolled(reparametrized(problem, whole), inner=steps), rest, merge)


def _begin(inner: Inner, start: tuple[PyTree, PyTree], hparams: PyTree) -> Point:
    params, model_state = start
    return Point(params, _tree.strong(inner.init(params, hparams)), model_state)


def _advance(inner: Inner, objective: Objective, at: Point, hparams: PyTree, t: Any) -> Point:
    """One training step."""
    model_state = at.model_state
    if inner.update is None:
        params, state = inner.move(objective, at.params, at.state, hparams, t)  # pyright: ignore[reportOptionalCall]
    else:
        loss = jax.grad(objective.stochastic, has_aux=True)
        grads, model_state = loss(at.params, hparams, model_state, t)
        params, state = inner.update(grads, at.params, at.state, hparams)
    return Point(like(params, at.params), like(state, at.state), model_state)


def _drift(method: str, new: Array, before: PyTree, fresh: PyTree) -> PyTree:
    """ξ of this call."""
    if method == "es":
        return fresh
    if method == "nres":
        return _tree.where(new, fresh, before)
    return _tree.add(_tree.where(new, _tree.zeros_like(before), before), fresh)


def _normal(key: Array, drift: PyTree) -> PyTree:
    """Standard normal draws like ξ."""
    leaves, treedef = jax.tree.flatten(drift)
    keys = jax.random.split(key, max(len(leaves), 1))
    return treedef.unflatten([jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=False)])


def _along(x: Array, like: Array) -> Array:
    """`[pairs]` against `[pairs, ...]`."""
    return x.reshape(x.shape + (1,) * (like.ndim - 1))


def _kept(alive: Array, new: PyTree, old: PyTree) -> PyTree:
    """Return the moved particles for pairs that are alive, and the old ones for the others."""
    keep = lambda x, y: jnp.where(alive.reshape((1, -1) + (1,) * (x.ndim - 2)), x, y)
    return jax.tree.map(lambda x, y: y if _tree.is_key(x) else keep(x, y), new, old)


def _spread(each: PyTree, mean: PyTree, alive: Array) -> Array:
    """Standard error of the mean over pairs, relative to it; inf above 1, and for a single pair."""
    count = jnp.sum(alive)
    off = jax.tree.map(lambda x, m: jnp.where(_along(alive, x), x - m[None], 0), each, mean)
    error = _tree.norm(off) / jnp.sqrt(jnp.maximum(count * (count - 1), 1).astype(_tree.dtype(mean)))
    size = _tree.norm(mean)
    relative = error / jnp.where(size > 0, size, 1)
    return jnp.where((count > 1) & (size > 0) & (relative <= 1), relative, jnp.inf)
