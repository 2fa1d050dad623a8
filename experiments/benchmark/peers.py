r"""How other libraries compute T1's hypergradient, each the way its documentation shows.

Every candidate is a function of no argument that returns the gradient in float32. What is not installed is left out,
and named. jaxopt: `custom_root` and `LBFGS` with `solve_cg`, and with its default, CG on the normal equations.
optimistix: BFGS with its default adjoint (dense). lineax: CG tagged positive definite. torch: L-BFGS and CG with
double-backward products, written by hand as hypertorch does it. TorchOpt: `custom_root` with `solve_cg`. Tolerances are
given by the caller, and the same for all.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tasks import Exact, Logistic, logistic_inner, logistic_outer

Candidates = dict[str, Callable[[], Any]]
NAMES = ("jaxopt", "lineax", "optimistix", "torch", "torchopt", "optuna")


def installed() -> dict[str, bool]:
    """Which of the peers can be imported."""
    return {name: importlib.util.find_spec(name) is not None for name in NAMES}


def adjoints(task: Logistic, answer: Exact, *, tol: float) -> Candidates:
    """The hypergradient at the exact solution: only the adjoint is computed."""
    have, found = installed(), {}
    w = jnp.asarray(answer.params, jnp.float32)
    if have["jaxopt"]:
        found["jaxopt cg"] = _jaxopt_adjoint(task, w, normal=False, tol=tol)
        found["jaxopt default"] = _jaxopt_adjoint(task, w, normal=True, tol=None)
    if have["lineax"]:
        found["lineax cg"] = _lineax_adjoint(task, w, tol=tol)
    if have["torch"]:
        found["torch by hand"] = _torch(task, answer.params, cg_tol=tol)
    if have["torch"] and have["torchopt"]:
        found["torchopt cg"] = _torchopt(task, answer.params, cg_tol=tol)
    return found


def solves(task: Logistic, *, tol: float, cg_tol: float) -> Candidates:
    """The hypergradient from w = 0, inner solve included, to an inner gradient norm of `tol`."""
    have, found = installed(), {}
    if have["jaxopt"]:
        found["jaxopt cg"] = _jaxopt_solve(task, normal=False, tol=tol, cg_tol=cg_tol)
        found["jaxopt default"] = _jaxopt_solve(task, normal=True, tol=tol, cg_tol=None)
    if have["optimistix"]:
        found["optimistix default"] = _optimistix_solve(task, tol=tol)
    if have["torch"]:
        found["torch by hand"] = _torch(task, None, cg_tol=cg_tol, tol=tol)
    if have["torch"] and have["torchopt"]:
        found["torchopt cg"] = _torchopt(task, None, cg_tol=cg_tol, tol=tol)
    return found


def jaxopt_gradient(task: Logistic) -> tuple[Any, tuple[Any, ...]]:
    """The compiled function and its arguments of `solves`' "jaxopt cg", for timing its compilation."""
    solver = _quietly("jaxopt").LBFGS(
        logistic_inner, tol=1e-5, maxiter=500, implicit_diff_solve=_jaxopt_linear(False, 1e-5)
    )
    function = jax.grad(
        lambda hparams, w, train, valid: logistic_outer(solver.run(w, hparams, train).params, hparams, valid)
    )
    return jax.jit(function), jax.tree.map(
        jnp.asarray, (task.hparams, np.zeros_like(task.hparams), task.train, task.valid)
    )


def _bound(gradient: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    compiled = jax.jit(gradient)
    args = jax.tree.map(jnp.asarray, args)
    return lambda: compiled(*args)


def _quietly(module: str) -> Any:
    with warnings.catch_warnings():  # jaxopt announces at import that it is no longer maintained
        warnings.simplefilter("ignore")
        return importlib.import_module(module)


def _jaxopt_linear(normal: bool, tol: float | None) -> Callable[..., Any]:
    solver = _quietly("jaxopt.linear_solve")
    if normal:
        return solver.solve_normal_cg
    return lambda matvec, b, **options: solver.solve_cg(matvec, b, tol=tol, **options)


def _jaxopt_adjoint(task: Logistic, w: jax.Array, *, normal: bool, tol: float | None) -> Callable[[], Any]:
    implicit_diff = _quietly("jaxopt.implicit_diff")

    @implicit_diff.custom_root(jax.grad(logistic_inner), solve=_jaxopt_linear(normal, tol))
    def solution(init: jax.Array, hparams: jax.Array, train: Any) -> jax.Array:
        del hparams, train
        return init

    return _bound(
        jax.grad(lambda hparams, w, train, valid: logistic_outer(solution(w, hparams, train), hparams, valid)),
        task.hparams,
        w,
        task.train,
        task.valid,
    )


def _jaxopt_solve(task: Logistic, *, normal: bool, tol: float, cg_tol: float | None) -> Callable[[], Any]:
    jaxopt = _quietly("jaxopt")
    options = {} if normal else {"implicit_diff_solve": _jaxopt_linear(False, cg_tol)}
    solver = jaxopt.LBFGS(logistic_inner, tol=tol, maxiter=500, **options)
    return _bound(
        jax.grad(lambda hparams, w, train, valid: logistic_outer(solver.run(w, hparams, train).params, hparams, valid)),
        task.hparams,
        jnp.zeros_like(task.hparams),
        task.train,
        task.valid,
    )


def _lineax_adjoint(task: Logistic, w: jax.Array, *, tol: float) -> Callable[[], Any]:
    lx = importlib.import_module("lineax")

    def gradient(hparams: jax.Array, w: jax.Array, train: Any, valid: Any) -> jax.Array:
        rhs = jax.grad(logistic_outer)(w, hparams, valid)
        size = jnp.linalg.norm(rhs)  # its tolerances are absolute and elementwise: see the scale by hand
        _, product = jax.linearize(lambda w: jax.grad(logistic_inner)(w, hparams, train), w)
        operator = lx.FunctionLinearOperator(product, jax.eval_shape(lambda: w), lx.positive_semidefinite_tag)
        v = lx.linear_solve(operator, rhs / size, lx.CG(rtol=tol, atol=tol), throw=False).value * size
        return -jax.grad(lambda h: jnp.vdot(jax.grad(logistic_inner)(w, h, train), v))(hparams)

    return _bound(gradient, task.hparams, w, task.train, task.valid)


def _optimistix_solve(task: Logistic, *, tol: float) -> Callable[[], Any]:
    optx = importlib.import_module("optimistix")

    def value(hparams: jax.Array, w: jax.Array, train: Any, valid: Any) -> jax.Array:
        # Its test is on the change of w and of the loss, elementwise: the tolerance that gives about the same gradient
        # norm.
        solver = optx.BFGS(rtol=10 * tol, atol=10 * tol)
        found = optx.minimise(
            lambda w, args: logistic_inner(w, args[0], args[1]),
            solver,
            w,
            args=(hparams, train),
            max_steps=500,
            throw=False,
        )
        return logistic_outer(found.value, hparams, valid)

    return _bound(jax.grad(value), task.hparams, jnp.zeros_like(task.hparams), task.train, task.valid)


class _Torch:
    """T1 in torch, on the same arrays."""

    def __init__(self, task: Logistic) -> None:
        self.torch = importlib.import_module("torch")
        self.torch.set_num_threads(1)
        tensor = self.torch.from_numpy
        self.hparams = tensor(task.hparams.copy()).requires_grad_()
        self.train = tuple(tensor(a) for a in task.train)
        self.valid = tuple(tensor(a) for a in task.valid)

    def outer(self, w: Any, batch: Any) -> Any:
        x, y = batch
        return self.torch.nn.functional.softplus(-y * (x @ w)).mean()

    def inner(self, w: Any, hparams: Any, batch: Any) -> Any:
        return self.outer(w, batch) + 0.5 * (hparams.exp() * w**2).sum()

    def minimise(self, hparams: Any, tol: float) -> Any:
        w = self.torch.zeros(hparams.shape, requires_grad=True)
        fixed = hparams.detach()
        optimizer = self.torch.optim.LBFGS(
            [w], max_iter=500, tolerance_grad=tol, tolerance_change=0.0, history_size=10, line_search_fn="strong_wolfe"
        )

        def closure() -> Any:
            optimizer.zero_grad()
            loss = self.inner(w, fixed, self.train)
            loss.backward()
            return loss

        optimizer.step(closure)
        return w.detach()


def _start(problem: _Torch, params: np.ndarray | None, tol: float | None) -> Callable[[Any], Any]:
    if params is not None:
        fixed = problem.torch.from_numpy(params.astype(np.float32))
        return lambda hparams: fixed.clone()
    assert tol is not None
    return lambda hparams: problem.minimise(hparams, tol)


def _torch(task: Logistic, params: np.ndarray | None, *, cg_tol: float, tol: float | None = None) -> Callable[[], Any]:
    problem = _Torch(task)
    torch, solve = problem.torch, _start(problem, params, tol)

    def gradient() -> np.ndarray:
        hparams = problem.hparams
        w = solve(hparams).requires_grad_()
        (rhs,) = torch.autograd.grad(problem.outer(w, problem.valid), w)
        (residual,) = torch.autograd.grad(problem.inner(w, hparams, problem.train), w, create_graph=True)
        x, r = torch.zeros_like(rhs), rhs.clone()
        p, rr = r.clone(), r @ r
        stop = cg_tol**2 * rr
        for _ in range(1000):
            (product,) = torch.autograd.grad(residual, w, p, retain_graph=True)
            alpha = rr / (p @ product)
            x, r = x + alpha * p, r - alpha * product
            fresh = r @ r
            if fresh <= stop:
                break
            p, rr = r + fresh / rr * p, fresh
        (cross,) = torch.autograd.grad(residual, hparams, x)
        return (-cross).numpy()

    return gradient


def _torchopt(
    task: Logistic, params: np.ndarray | None, *, cg_tol: float, tol: float | None = None
) -> Callable[[], Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchopt = importlib.import_module("torchopt")
        functional = importlib.import_module("torch.func")
    problem = _Torch(task)
    solve, train = _start(problem, params, tol), problem.train

    @torchopt.diff.implicit.custom_root(
        functional.grad(lambda w, hparams: problem.inner(w, hparams, train)),
        argnums=1,
        solve=torchopt.linear_solve.solve_cg(rtol=cg_tol, atol=0.0),
    )
    def solution(w: Any, hparams: Any) -> Any:
        del w
        return solve(hparams)

    zeros = problem.torch.zeros(task.hparams.shape)

    def gradient() -> np.ndarray:
        value = problem.outer(solution(zeros, problem.hparams), problem.valid)
        return problem.torch.autograd.grad(value, problem.hparams)[0].numpy()

    return gradient
