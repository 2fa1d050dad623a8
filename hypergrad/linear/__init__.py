"""Solvers for the adjoint system; each function returns a `Linear`."""

from hypergrad.linear._linear import Linear as Linear
from hypergrad.linear._linear import LinearResult as LinearResult
from hypergrad.linear.cg import cg as cg
from hypergrad.linear.dense import dense as dense
from hypergrad.linear.gmres import gmres as gmres
from hypergrad.linear.identity import identity as identity
from hypergrad.linear.neumann import neumann as neumann
from hypergrad.linear.nystrom import nystrom as nystrom
from hypergrad.linear.precondition import jacobi as jacobi
from hypergrad.linear.precondition import precondition as precondition
