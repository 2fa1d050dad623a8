"""How parameters are found: each function returns an `Inner`."""

from hypergrad.inner.lbfgs import lbfgs as lbfgs
from hypergrad.inner.newton import newton as newton
