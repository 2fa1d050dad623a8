r"""One step of the outer loop, which is compiled once, and K of them in one call.

    u ← u + optimizer(∂F/∂u),   ∂F/∂u = (∂T/∂u)ᵀ g

where g comes from any solver. With optax, a step that is not usable leaves u and the optimizer unchanged. With a
controller,

    s = prepare(outer, solver);   out, s' = hypergrad(s, T(u));   next, outer, ok = update(∂F/∂u, outer, u, out)

and where `ok` is false, or `judge` has already rejected the trial, the solver and the last accepted u stay bit for bit.
Cost: the hypergradient. A step reports three short vectors, so that one transfer each brings them to the host.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from hypergrad import _tree
from hypergrad._checks import check_same_structure
from hypergrad._sharding import COPIED, spread_by_xla
from hypergrad._solver import Hypergradient, Info, InputError, InputTypeError, Solver, Status, evaluation, usable
from hypergrad._tree import PyTree, keystr
from hypergrad.domains._domain import settle, to_constrained
from hypergrad.outer._carry import AS_IT_IS, Carry
from hypergrad.outer._result import SCALARS, TRAJECTORY, Layout
from hypergrad.outer.controllers import Controller


class Kept(NamedTuple):
    """The best point so far.

    Attributes:
        step: its number; -1 before the first accepted one.
        value: outer loss; NaN before.
        hparams: hyperparameters of that step, constrained.
        params: what the solver's response returned there.
        state: the solver's state there, if it will be needed later; else None.
    """

    step: Array
    value: Array
    hparams: PyTree
    params: PyTree
    state: Any = None


class Loop(NamedTuple):
    """Everything that the next step needs besides data and key, which is what a checkpoint has to hold.

    Attributes:
        step: number of the next step.
        solver: state of the solver, at `accepted`.
        accepted: unconstrained hyperparameters of the last accepted point; None with optax, for which it equals the
            trial.
        trial: unconstrained hyperparameters of the next step.
        outer: state of the outer optimizer or controller.
        best: see `Kept`.
    """

    step: Array
    solver: Any
    accepted: PyTree
    trial: PyTree
    outer: Any
    best: Kept

    @property
    def point(self) -> PyTree:
        """The current point of the run, unconstrained: never a trial that may still be rejected."""
        return self.trial if self.accepted is None else self.accepted


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packet:
    """The report of one step to the host, packed into few arrays.

    Attributes:
        floats: scalars, then hyperparameters or their summary.
        integers: signed integers and booleans.
        naturals: unsigned integers; None where there are none.
        layout: positions of the values in these arrays.
    """

    floats: Array
    integers: Array
    naturals: Array | None
    layout: Layout = dataclasses.field(metadata={"static": True})


class Taken(NamedTuple):
    """The outcome of one trial: the fields of `Loop` after it, and the values to report."""

    solver: Any
    accepted: PyTree
    trial: PyTree
    outer: Any
    out: Hypergradient
    status: Array
    ok: Array
    computed: Array  # False if the trial was rejected before a hypergradient was computed
    visited: Any  # the solver's state at the trial, accepted or not


def start(
    respond: Callable[..., PyTree], outer: Any, state: Any, hparams: PyTree, free: PyTree, *, keep_state: bool = False
) -> Loop:
    """The loop before its first step; `respond` is the solver's response, compiled."""
    response = respond(state, hparams)
    nan = jnp.asarray(jnp.nan, jnp.result_type(float))
    best = Kept(jnp.int32(-1), nan, hparams, response, state if keep_state else None)
    accepted = free if isinstance(outer, Controller) else None
    return Loop(*(_tree.strong(part) for part in (jnp.int32(0), state, accepted, free, outer.init(free), best)))


def make_advance(
    solver: Solver,
    outer: Any,
    domain: PyTree,
    shows: Collection[str] = (),
    seen: dict[str, Any] | None = None,
    carry: Carry = AS_IT_IS,
) -> Callable[..., tuple[Any, dict[str, PyTree], Packet]]:
    """Return `(loop, train, valid, key) -> (loop, shown, report)`, to be compiled once.

    Args:
        solver: solver of the run.
        outer: optax optimizer or controller.
        domain: pytree of domains.
        shows: whether the callbacks ask for `params` or `state` in addition to the hyperparameters.
        seen: filled, while the step is traced, with the functions of `outer` that are called and the shapes of their
            arguments.
        carry: the form in which `loop` is given and returned. One step and several in a call have the same, since XLA
            rounds a sum and a product otherwise where it computes them in one kernel with what follows.
    """
    seen = {} if seen is None else seen
    controlled = isinstance(outer, Controller)
    take = _controlled(solver, outer, domain, seen) if controlled else _always(solver, outer, domain, seen)
    compares = controlled and outer.compares

    def advance(held: Any, train: PyTree, valid: PyTree, key: Array | None) -> tuple[Any, dict[str, PyTree], Packet]:
        loop: Loop = carry.unpack(held)
        hparams, pull = jax.vjp(functools.partial(to_constrained, domain), loop.trial)
        if not compares:
            key = None if key is None else jax.random.fold_in(key, loop.step)
        taken = take(loop, hparams, pull, train, valid, key)
        _check_part("state of the solver", _tree.strong(taken.solver), loop.solver)
        _check_part("state of outer", _tree.strong(taken.outer), loop.outer)
        response = _tree.strong(solver.response(taken.visited, hparams))
        _check_part("what the solver's response returns", response, loop.best.params)
        value = jnp.asarray(taken.out.value, loop.best.value.dtype)
        better = taken.ok if compares else taken.ok & ~(value >= loop.best.value)  # the first best value is NaN
        here = Kept(
            loop.step, value, hparams, response, None if loop.best.state is None else _tree.strong(taken.visited)
        )
        best = _tree.where(better, here, loop.best)
        new = _tree.strong(Loop(loop.step + 1, taken.solver, taken.accepted, taken.trial, taken.outer, best))
        shown = {"hparams": hparams, "params": response, "state": taken.visited}
        shown = {name: tree for name, tree in shown.items() if name == "hparams" or name in shows}
        return carry.pack(new), shown, _pack(taken, hparams)

    return spread_by_xla(advance, lambda loop: (loop, COPIED, COPIED))


def _always(solver: Solver, outer: Any, domain: PyTree, seen: dict[str, Any]) -> Callable[..., Taken]:
    """With optax, a usable step is taken, and no step is ever taken back."""
    update = optax.with_extra_args_support(outer).update

    def take(loop: Loop, hparams: PyTree, pull: Any, train: PyTree, valid: PyTree, key: Array | None) -> Taken:
        out, state = solver.hypergrad(loop.solver, hparams, train, valid, key=key)
        grad = _in_free(out, hparams, pull)
        _note(seen, lambda g, s, u, v: update(g, s, u, value=v, grad=g), grad, loop.outer, loop.trial, out.value)
        try:
            updates, outer_state = update(grad, loop.outer, loop.trial, value=out.value, grad=grad)
        except TypeError as error:
            raise InputTypeError(
                f"tune: outer cannot take a step from a gradient and a value alone ({error}): use "
                "optax.adam or optax.sgd, and optax.lbfgs with linesearch=None."
            ) from error
        free = settle(domain, optax.apply_updates(loop.trial, updates), loop.trial)
        # An optimizer's state that overflows (a second moment of 1e60) would silently stop all later steps.
        sound = _tree.all_finite((out.grad, grad, free)) & (
            _tree.all_finite(outer_state) | ~_tree.all_finite(loop.outer)
        )
        status = _status(out.info.status, out.value, sound)
        ok = usable(status)
        free, outer_state = _tree.where(ok, (free, outer_state), (loop.trial, loop.outer))
        return Taken(state, None, free, outer_state, out, status, ok, jnp.bool_(True), state)

    return take


def _controlled(solver: Solver, outer: Controller, domain: PyTree, seen: dict[str, Any]) -> Callable[..., Taken]:
    """With a controller, a trial is accepted, or everything but the controller returns to the last accepted point."""

    def differentiate(loop: Loop, solver_state: Any, outer_state: Any, hparams: PyTree, pull: Any, *data: Any) -> Taken:
        train, valid, key = data
        out, after = solver.hypergrad(solver_state, hparams, train, valid, key=key)
        grad = _in_free(out, hparams, pull)
        _check_part("state of the solver", after := _tree.strong(after), loop.solver)
        status = _status(out.info.status, out.value, _tree.all_finite((out.grad, grad)))
        good = usable(status)
        told = out._replace(
            value=jnp.where(good, out.value, jnp.inf), grad=_tree.where(good, out.grad, _tree.zeros_like(out.grad))
        )
        grad = _tree.where(good, grad, _tree.zeros_like(grad))
        _note(seen, outer.update, grad, outer_state, loop.trial, told)
        proposed, moved, wants = _verdict("update", outer.update(grad, outer_state, loop.trial, told), loop)
        finite = _tree.all_finite(proposed)
        status = jnp.where(good & ~finite, int(Status.NONFINITE_GRAD), status)
        ok = usable(status) & (wants | (loop.best.step < 0))
        kept, point = _tree.where(ok, (after, loop.trial), (loop.solver, loop.accepted))
        trial = settle(domain, _tree.where(finite, proposed, point), point)
        moved = _tree.where(finite, moved, outer_state)
        return Taken(kept, point, trial, moved, out, status, ok, jnp.bool_(True), after)

    def take(loop: Loop, hparams: PyTree, pull: Any, train: PyTree, valid: PyTree, key: Array | None) -> Taken:
        prepared = outer.prepare(loop.outer, loop.solver)
        if outer.judge is None:
            return _tree.strong(differentiate(loop, prepared, loop.outer, hparams, pull, train, valid, key))
        value, info, after = evaluation(solver)(prepared, hparams, train, valid, key=key)
        _check_part("state of the solver", after := _tree.strong(after), loop.solver)
        status = _status(info.status, value, jnp.bool_(True))
        good = usable(status)
        told = jnp.where(good, value, jnp.inf)
        _note(seen, outer.judge, told, loop.outer, loop.trial, info)
        proposed, moved, wants = _verdict("judge", outer.judge(told, loop.outer, loop.trial, info), loop)

        def run() -> Taken:
            taken = differentiate(loop, after, moved, hparams, pull, train, valid, key)
            spent = _spent(taken.out.info, info)  # by both, where the judge asked for the loss first
            return _tree.strong(taken._replace(out=taken.out._replace(info=spent)))

        nothing = jax.tree.map(_nothing, jax.eval_shape(run).out)

        def refuse() -> Taken:
            finite = _tree.all_finite(proposed)
            trial = settle(domain, _tree.where(finite, proposed, loop.accepted), loop.accepted)
            out = nothing._replace(
                value=jnp.asarray(value, nothing.value.dtype), info=_without_hypergradient(info, nothing.info)
            )
            kept = _tree.where(finite, moved, loop.outer)
            no = jnp.bool_(False)
            return _tree.strong(Taken(loop.solver, loop.accepted, trial, kept, out, status, no, no, after))

        return lax.cond(good & (wants | (loop.best.step < 0)), run, refuse)

    return take


def make_block(
    advance: Callable[..., tuple[Loop, dict[str, PyTree], Packet]], most: int, streams: Collection[str], *, show: bool
) -> Callable[..., tuple[Loop, dict[str, PyTree], Packet]]:
    """Return `(loop, count, train, valid, key) -> (loop, shown, report)`: `count` steps, at most `most`, in one call.

    The number of steps is traced, so that one program also serves the last, shorter call, and a run that continues with
    another `most`. What each step shows and reports is stored in its own row of buffers of `most` rows.

    Args:
        advance: the step.
        most: steps in one call.
        streams: names of the arguments (`train`, `valid`) that hold a batch for each step, on a new leading axis.
        show: whether what is shown will be read.
    """

    def batch(name: str, data: PyTree, step: Any) -> PyTree:
        return jax.tree.map(lambda x: x[step], data) if name in streams else data

    def block(
        loop: Loop, count: Array, train: PyTree, valid: PyTree, key: Array | None
    ) -> tuple[Loop, dict[str, PyTree], Packet]:
        def one(loop: Loop, step: Any) -> tuple[Loop, tuple[dict[str, PyTree], Packet]]:
            loop, shown, report = advance(loop, batch("train", train, step), batch("valid", valid, step), key)
            return loop, (words(shown) if show else {}, report)

        def body(carry: Any) -> Any:
            step, loop, rows = carry
            loop, row = one(loop, step)
            put = lambda rows, row: lax.dynamic_update_index_in_dim(rows, row, step, 0)
            return step + 1, loop, jax.tree.map(put, rows, row)

        row = jax.eval_shape(one, loop, jnp.int32(0))[1]
        rows = jax.tree.map(lambda x: jnp.zeros((most, *x.shape), x.dtype), row)
        _, loop, (shown, report) = lax.while_loop(lambda carry: carry[0] < count, body, (jnp.int32(0), loop, rows))
        return loop, shown, report

    return block


def words(tree: PyTree) -> PyTree:
    """Return the tree with typed keys as plain integers, which can be stored in a buffer."""
    return jax.tree.map(lambda x: jax.random.key_data(x) if _tree.is_key(x) else x, tree)


def _in_free(out: Hypergradient, hparams: PyTree, pull: Any) -> PyTree:
    """The derivative with respect to the unconstrained hyperparameters."""
    _check_output(out, hparams)
    (grad,) = pull(jax.tree.map(lambda g, h: jnp.asarray(g).astype(h.dtype), out.grad, hparams))
    return grad


def _note(seen: dict[str, Any], function: Callable[..., Any], *arguments: Any) -> None:
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), arguments)
    seen[f"{len(seen)}"] = (function, shapes)


def _status(code: Any, value: Array, sound: Array) -> Array:
    """The solver's status, or a failure where that status is usable but the numbers are not finite."""
    status = jnp.asarray(code, jnp.int32)
    bad = jnp.where(jnp.isfinite(value), int(Status.NONFINITE_GRAD), int(Status.NONFINITE_LOSS))
    return jnp.where(usable(status) & ~(sound & jnp.isfinite(value)), bad, status)


def _verdict(name: str, returned: Any, loop: Loop) -> tuple[PyTree, Any, Array]:
    if not isinstance(returned, tuple) or len(returned) != 3:
        raise InputTypeError(f"tune: outer.{name} must return (next, outer, accepted), found {returned!r}.")
    free, outer, ok = returned
    check_same_structure(f"the trial that outer.{name} proposes", free, loop.trial, "return a pytree like `free`.")
    outer = _tree.strong(outer)
    _check_part("state of outer", outer, loop.outer)
    if jnp.shape(ok) != ():
        raise InputError(f"tune: outer.{name} must accept or reject by one boolean, found shape {jnp.shape(ok)}.")
    free = jax.tree.map(lambda x, like: jnp.asarray(x).astype(like.dtype), free, loop.trial)
    return free, outer, jnp.asarray(ok, bool)


def _nothing(shape: Any) -> Array:
    floating = jnp.issubdtype(shape.dtype, jnp.inexact)
    return jnp.full(shape.shape, jnp.nan if floating else 0, shape.dtype)


def _spent(info: Info, before: Info) -> Info:
    """The report of a hypergradient, with the steps that came before it in the same trial."""
    total = lambda name: getattr(info, name) + jnp.asarray(getattr(before, name), jnp.int32)
    return info._replace(inner_steps=total("inner_steps"), linear_steps=total("linear_steps"))


def _without_hypergradient(info: Info, nothing: Info) -> Info:
    """Return the report of an evaluation, in the dtypes of a hypergradient's; NaN for what only a hypergradient has."""
    known = {"status": info.status, "inner_residual": info.inner_residual, "inner_steps": info.inner_steps}
    known["linear_steps"] = info.linear_steps
    cast = lambda name, like: jnp.asarray(known[name], like.dtype) if name in known else like
    extra = {n: jnp.asarray(info.extra[n], x.dtype) if n in info.extra else x for n, x in nothing.extra.items()}
    fields = {name: cast(name, getattr(nothing, name)) for name in Info._fields if name != "extra"}
    return Info(**fields, extra=extra)


def _pack(taken: Taken, hparams: PyTree) -> Packet:
    out, info = taken.out, taken.out.info
    scalars: dict[str, Any] = {
        "value": out.value,
        "grad_norm": _tree.norm(jax.tree.map(jnp.asarray, out.grad)),
        "status": taken.status,
    }
    scalars |= {name: getattr(info, name) for name in SCALARS if name not in scalars}
    scalars |= {name: jnp.asarray(scalars[name]).astype(jnp.int32) for name in ("inner_steps", "linear_steps")}
    scalars |= {"accepted": taken.ok, "computed": taken.computed, **out.metrics, **info.extra}
    scalars = {name: jnp.asarray(value) for name, value in scalars.items()}
    kinds = {name: _kind(value.dtype) for name, value in scalars.items()}
    leaves = jax.tree.leaves(hparams)
    if _tree.size(hparams) <= TRAJECTORY:
        parts = [leaf.ravel() for leaf in leaves]
    else:
        parts = [
            jnp.stack([leaf.min(), leaf.mean(), leaf.max()]) if leaf.size else jnp.full(3, jnp.nan, leaf.dtype)
            for leaf in leaves
        ]
    of = lambda kind: [scalars[name] for name in scalars if kind == kinds[name]]
    dtype = _tree.dtype([*of("float"), *leaves])
    floats = jnp.concatenate(
        [jnp.stack([x.astype(dtype) for x in of("float")]), *(part.astype(dtype) for part in parts)]
    )
    integers = jnp.stack([x.astype(jnp.result_type(int)) for kind in ("int", "bool") for x in of(kind)])
    naturals = [x.astype(jnp.result_type(jnp.uint32, *of("uint"))) for x in of("uint")]
    layout = Layout(tuple(kinds.items()), tuple(out.metrics), tuple(info.extra))
    return Packet(floats, integers, jnp.stack(naturals) if naturals else None, layout)


def _kind(dtype: Any) -> str:
    if jnp.issubdtype(dtype, jnp.bool_):
        return "bool"
    if jnp.issubdtype(dtype, jnp.unsignedinteger):
        return "uint"
    return "int" if jnp.issubdtype(dtype, jnp.integer) else "float"


def _check_output(out: Any, hparams: PyTree) -> None:
    if not isinstance(out, Hypergradient):
        raise InputTypeError(
            f"tune: solver.hypergrad must return (hg.Hypergradient, state), found {type(out).__name__} first."
        )
    if jnp.shape(out.value) != ():
        raise InputError(f"tune: the outer loss must be a scalar, found shape {jnp.shape(out.value)}: take its mean.")
    check_same_structure("the hypergradient", out.grad, hparams, "it must be a pytree like hparams.")
    reported = out.info._asdict() | out.info.extra | out.metrics
    reported.pop("extra")
    for name, value in reported.items():
        if jnp.shape(value) != ():
            raise InputError(f"tune: the solver reports {name} of shape {jnp.shape(value)}, not a scalar: reduce it.")
    names = (*SCALARS, "seconds", "hparams", "params", "state", "accepted", "computed")
    taken = [name for name in out.metrics if name in (*names, *out.info.extra)]
    if taken:
        raise InputError(f"tune: outer_loss returned a metric named {taken[0]!r}, a name that is taken: rename it.")


def _check_part(part: str, found: PyTree, expected: PyTree) -> None:
    remedy = "a step must return the state with which it can be called again."
    check_same_structure(part, found, expected, remedy)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        if x.dtype != y.dtype:
            raise InputTypeError(f"tune: {part}{keystr(path)} changed from {y.dtype} to {x.dtype}: {remedy}")
