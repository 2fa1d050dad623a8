"""Every finite number."""

from __future__ import annotations

import numpy as np
from jax import Array

from hypergrad.domains._domain import Domain


def real() -> Domain:
    """Every finite number: no transform.

    >>> import hypergrad as hg
    >>> hg.domains.real().name
    'real()'
    """
    return Domain("real()", _same, _same, lambda u, before: u, np.isfinite, "finite", "start from a finite number")


def _same(u: Array) -> Array:
    return u
