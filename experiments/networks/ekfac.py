"""How many products EK-FAC saves conjugate gradients, at best.

    python experiments/networks/ekfac.py --json

On the dense Gauss-Newton matrix G of four networks, after 10 and after 300 steps of training: the products at which
conjugate gradients with a preconditioner point as well as five without one. EK-FAC is made of the exact G, so that no
sampling and no running mean makes it worse: each block of a leaf `[a, b]` in the eigenbasis of its two partial traces,
with its diagonal there as eigenvalues (George et al. 2018, arXiv:1806.03884); Jacobi has the diagonal of G.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import numpy as np

from experiments._common import experiment
from experiments.networks.models import Network, network
from experiments.networks.run import OUTER, PRODUCTS, START, matrices, trained

NAMES = ("tanh MLP", "ResNet", "char LSTM", "char transformer")
MOST = 12  # products
Vector = np.ndarray


def directions(matrix: Vector, rhs: Vector, precondition: Callable[[Vector], Vector]) -> list[Vector]:
    """The iterates of conjugate gradients after 1 to `MOST` products."""
    x, r = np.zeros_like(rhs), rhs.copy()
    p = precondition(r)
    size, found = r @ p, []
    for _ in range(MOST):
        product = matrix @ p
        length = size / (p @ product)
        x, r = x + length * p, r - length * product
        z = precondition(r)
        p, size = z + (r @ z / size) * p, r @ z
        found.append(x)
    return found


def eigenbasis(matrix: Vector, params: Any) -> list[tuple[slice, Vector, Vector]]:
    """EK-FAC: for each leaf its place, the orthogonal matrix U_a ⊗ U_b, and the diagonal of G in that basis."""
    found, start = [], 0
    for leaf in jax.tree.leaves(params):
        here = slice(start, start := start + leaf.size)
        block, b = matrix[here, here], leaf.shape[-1]
        four = block.reshape(-1, b, leaf.size // b, b)
        left, right = (np.linalg.eigh(np.einsum(trace, four))[1] for trace in ("icjc->ij", "cicj->ij"))
        basis = np.kron(left, right)
        found.append((here, basis, np.maximum(np.einsum("ij,ij->j", basis, block @ basis), 0)))
    return found


def products(net: Network, at: Any, state: Any, seed: int, damping: float) -> dict[str, int]:
    """Products until the hypergradient of a decay for each parameter points as well as after five plain ones."""
    rows = np.random.default_rng(seed).permutation(len(net.data[0][1]))[: net.batch]
    batch = jax.tree.map(lambda x: x[rows], net.data[0])
    _, *found = at(state.params, state.model_state, batch, net.data[1], jax.random.key(seed))
    gauss_newton, rhs, w = (np.asarray(x, np.float64) for x in found)
    shift = damping * np.linalg.norm(gauss_newton) / np.sqrt(len(w))
    matrix, blocks = gauss_newton + shift * np.eye(len(w)), eigenbasis(gauss_newton, net.params)
    exact = w * np.linalg.solve(matrix, rhs)

    def ekfac(r: Vector) -> Vector:
        return np.concatenate([basis @ ((basis.T @ r[here]) / (values + shift)) for here, basis, values in blocks])

    def cosines(precondition: Callable[[Vector], Vector]) -> list[float]:
        given = [w * x for x in directions(matrix, rhs, precondition)]
        return [g @ exact / (np.linalg.norm(g) * np.linalg.norm(exact)) for g in given]

    wanted = cosines(lambda r: r)[PRODUCTS - 1]
    ways = {"jacobi": lambda r: r / np.diag(matrix), "ekfac": ekfac}
    reached = {name: np.asarray(cosines(way)) >= wanted for name, way in ways.items()}
    return {name: int(np.argmax(there)) + 1 if there.any() else MOST + 1 for name, there in reached.items()}


def measure(options: argparse.Namespace, numbers: dict[str, Any]) -> None:
    for name in NAMES[:1] if options.smoke else NAMES:
        net = network(name, options.seed)
        at = matrices(net)
        for outer in (1,) if options.smoke else (1, OUTER):
            state = trained(name, net, START, options.seed, outer)[1][-1]
            for damping in (0.01, 0.1):
                case = f"{name}, {10 * outer} steps, damping {damping}"
                numbers[case] = products(net, at, state, options.seed, damping)
                print(case, numbers[case], flush=True)


if __name__ == "__main__":
    experiment(__file__, __doc__, measure)
