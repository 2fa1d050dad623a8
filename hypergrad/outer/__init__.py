"""How hyperparameters move: the loop around a solver, and what it returns."""

from hypergrad.outer.callbacks import Callback as Callback
from hypergrad.outer.result import Best as Best
from hypergrad.outer.result import History as History
from hypergrad.outer.result import Result as Result
from hypergrad.outer.result import TuneStatus as TuneStatus
from hypergrad.outer.tune import tune as tune
