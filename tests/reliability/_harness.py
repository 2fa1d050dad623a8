"""Runs every fault through a solver: in a batch, one at a time under jit, and without jit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import hypergrad as hg
from tests.reliability._family import Member, arguments, stack, truth
from tests.reliability._faults import Fault, Outcome, judge
from tests.reliability._methods import METHODS, solver


class Batch(NamedTuple):
    """What came of a batch in which every fault stands between two good problems.

    Attributes:
        outcomes: one a fault.
        same: whether all good problems have the bits that they have among good ones alone.
        finite: whether the state can be used again, one a fault.
        good: whether all good problems are OK and right.
    """

    outcomes: list[Outcome]
    same: bool
    finite: list[bool]
    good: bool


def in_a_batch(name: str, faults: Sequence[Fault]) -> Batch:
    """All faults at once under `jax.vmap`."""
    made, kind = solver(name), METHODS[name].truth
    healthy = [Member(b=(0.7 + 0.01 * i, -0.4, 1.1)) for i in range(len(faults) + 1)]
    mixed = [m for fault, good in zip(faults, healthy, strict=False) for m in (good, fault.member)] + healthy[-1:]
    clean = [m for good in healthy[:-1] for m in (good, Member())] + healthy[-1:]
    step = jax.jit(jax.vmap(made.hypergrad))
    out, state = step(*stack([arguments(made, m) for m in mixed]))
    reference, after = step(*stack([arguments(made, m) for m in clean]))
    fine = slice(0, None, 2)
    good = [judge(pick(out, 2 * i), truth(m, kind), 1.0) for i, m in enumerate(healthy)]
    return Batch(
        [judge(pick(out, 2 * i + 1), truth(f.member, kind), f.member.size) for i, f in enumerate(faults)],
        _same_bits(pick((out, _carried(state)), fine), pick((reference, _carried(after)), fine)),
        [is_finite(pick(_carried(state), 2 * i + 1)) for i in range(len(faults))],
        all(o.status == hg.Status.OK and not o.silent for o in good),
    )


def one_by_one(name: str, faults: Sequence[Fault], *, jit: bool) -> list[Outcome]:
    """Each fault alone; with `jit`, through one compiled function."""
    made, kind = solver(name), METHODS[name].truth
    step = jax.jit(made.hypergrad) if jit else made.hypergrad
    found = []
    for fault in faults:
        out, _ = step(*arguments(made, fault.member))
        found.append(judge(out, truth(fault.member, kind), fault.member.size))
    assert not jit or step._cache_size() == 1, "faults, options and data are all values"
    return found


def pick(tree: Any, index: Any) -> Any:
    return jax.tree.map(lambda x: x[index], tree)


def is_finite(tree: Any) -> bool:
    return all(np.all(np.isfinite(np.asarray(x))) for x in jax.tree.leaves(tree))


def _carried(state: Any) -> Any:
    """The state without its options, which faults change."""
    return state._replace(options={}) if hasattr(state, "options") else state


def _same_bits(found: Any, expected: Any) -> bool:
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)
