"""How the adjoint system is solved: each function returns a `Linear`."""

from hypergrad.linear.cg import cg as cg
from hypergrad.linear.precondition import jacobi as jacobi
from hypergrad.linear.precondition import precondition as precondition
