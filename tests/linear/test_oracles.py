"""Other libraries on the same systems, in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import lineax
import numpy as np
import scipy.sparse.linalg

from tests._helpers import tol
from tests.linear._systems import EPS, contraction, error, run, spd, vector


def test_cg_takes_the_iterates_of_scipy():
    matrix, rhs = spd(30.0), vector()
    for steps in (1, 4, 9):
        expected, _ = scipy.sparse.linalg.cg(matrix, rhs, rtol=0, atol=0, maxiter=steps)
        assert error(run("cg budget", matrix, rhs, max_steps=steps).x, expected) <= tol(1e-12, 1e-4)


def test_gmres_takes_the_iterates_of_scipy():
    matrix, rhs = contraction(0.7), vector()
    for steps in (1, 4, 9):
        expected, _ = scipy.sparse.linalg.gmres(matrix, rhs, rtol=0, atol=0, restart=steps, maxiter=1)
        assert error(run("gmres budget", matrix, rhs, max_steps=steps).x, expected) <= tol(1e-12, 1e-4)


def test_cg_agrees_with_jax():
    matrix, rhs = jnp.asarray(spd(100.0), float), jnp.asarray(vector(), float)
    expected, _ = jax.scipy.sparse.linalg.cg(lambda v: matrix @ v, rhs, tol=tol(1e-12, 1e-6))
    assert error(run("cg", matrix, rhs).x, np.asarray(expected)) <= tol(1e-8, 1e-3)


def test_cg_and_gmres_agree_with_lineax():
    for name, matrix in [("cg", spd(100.0)), ("gmres", contraction(0.7))]:
        a, b = jnp.asarray(matrix, float), jnp.asarray(vector(), float)
        tag = lineax.positive_semidefinite_tag if name == "cg" else ()
        solver = lineax.CG(1e3 * EPS, 1e3 * EPS) if name == "cg" else lineax.GMRES(1e3 * EPS, 1e3 * EPS, restart=24)
        expected = lineax.linear_solve(lineax.MatrixLinearOperator(a, tag), b, solver, throw=False).value
        assert error(run(name, matrix, b).x, np.asarray(expected)) <= tol(1e-8, 1e-3)
