"""How the dependence of the solution on the hyperparameters is differentiated: each function returns a `Solver`."""

from hypergrad.solvers.best_response import best_response as best_response
from hypergrad.solvers.direct import direct as direct
from hypergrad.solvers.evolution import evolution as evolution
from hypergrad.solvers.hypernetwork import hypernetwork as hypernetwork
from hypergrad.solvers.implicit import implicit as implicit
from hypergrad.solvers.online import online as online
from hypergrad.solvers.self_tuning import self_tuning as self_tuning
from hypergrad.solvers.single_loop import single_loop as single_loop
from hypergrad.solvers.tasks import tasks as tasks
from hypergrad.solvers.unrolled import unrolled as unrolled
