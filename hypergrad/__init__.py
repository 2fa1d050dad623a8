"""Gradient-based hyperparameter optimization in JAX: two losses in, correct hypergradients out.

The problem       Problem, compose, constrain, chunked; minibatches, stream, folds
Methods           implicit, online, unrolled, direct, hypernetwork, self_tuning, single_loop, evolution, tasks,
                  best_response
Their parts       inner (finds parameters), linear (solves the adjoint system), responses, prox, Regularity
Tuning            tune, multistart, outer (controllers, checkpoints), domains, augment; Result, TuneStatus
Across widths     scaling: hyperparameters tuned on a narrow model, used in a wide one
Trust             check, Status, raise_if_failed, diagnostics
Examples          attribute: what leaving out each training example would change
Without a split   objectives (outer losses that need no validation set)
Writing your own  Solver, About, Hypergradient, Info; options, Number, Choice, Slot (what a factory takes)

`help(hypergrad.implicit)`, like that of every public function, shows equations, arguments with units, errors and an
example.
"""

__version__ = "0.1.0"

from hypergrad import augment as augment
from hypergrad import diagnostics as diagnostics
from hypergrad import domains as domains
from hypergrad import inner as inner
from hypergrad import linear as linear
from hypergrad import objectives as objectives
from hypergrad import outer as outer
from hypergrad import prox as prox
from hypergrad import responses as responses
from hypergrad import scaling as scaling
from hypergrad.domains.constrain import constrain as constrain
from hypergrad.chunked import chunked as chunked
from hypergrad.folds import folds as folds
from hypergrad._data import minibatches as minibatches
from hypergrad._data import stream as stream
from hypergrad._options import Choice as Choice
from hypergrad._options import Number as Number
from hypergrad._options import options as options
from hypergrad._options import Slot as Slot
from hypergrad._problem import compose as compose
from hypergrad._problem import Problem as Problem
from hypergrad._solver import About as About
from hypergrad._solver import FailedHypergradientError as FailedHypergradientError
from hypergrad._solver import Hypergradient as Hypergradient
from hypergrad._solver import HypergradError as HypergradError
from hypergrad._solver import Info as Info
from hypergrad._solver import InputError as InputError
from hypergrad._solver import InputTypeError as InputTypeError
from hypergrad._solver import raise_if_failed as raise_if_failed
from hypergrad._solver import Solver as Solver
from hypergrad._solver import Status as Status
from hypergrad.diagnostics.attribution import attribute as attribute
from hypergrad.diagnostics.check import check as check
from hypergrad.outer import Result as Result
from hypergrad.outer import TuneStatus as TuneStatus
from hypergrad.outer.multistart import multistart as multistart
from hypergrad.outer.tune import tune as tune
from hypergrad.solvers.regularity import Regularity as Regularity
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
