"""Inner solvers, which find the parameters; each function returns an `Inner`."""

from hypergrad.inner._inner import Inner as Inner
from hypergrad.inner._inner import InnerResult as InnerResult
from hypergrad.inner.fixed_point import fixed_point as fixed_point
from hypergrad.inner.gradient import gradient as gradient
from hypergrad.inner.lbfgs import lbfgs as lbfgs
from hypergrad.inner.newton import newton as newton
from hypergrad.inner.projected import projected as projected
from hypergrad.inner.proximal import proximal as proximal
from hypergrad.inner.root import root as root
