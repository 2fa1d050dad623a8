"""The loop around a solver that moves the hyperparameters, and what it returns."""

from hypergrad.checkpoints._durable import CheckpointError as CheckpointError
from hypergrad.checkpoints.checkpoint import Loaded as Loaded
from hypergrad.checkpoints.checkpoint import Store as Store
from hypergrad.checkpoints.checkpoint import load as load
from hypergrad.checkpoints.checkpoint import save as save
from hypergrad.checkpoints.orbax import orbax as orbax
from hypergrad.outer._result import Best as Best
from hypergrad.outer._result import History as History
from hypergrad.outer._result import Result as Result
from hypergrad.outer._result import Retrained as Retrained
from hypergrad.outer._result import TuneStatus as TuneStatus
from hypergrad.outer.callbacks import Callback as Callback
from hypergrad.outer.callbacks import json_lines as json_lines
from hypergrad.outer.controllers import Controller as Controller
from hypergrad.outer.controllers import set_options as set_options
from hypergrad.outer.hoag import hoag as hoag
from hypergrad.outer.lbfgs import lbfgs as lbfgs
from hypergrad.outer.maid import maid as maid
from hypergrad.outer.multistart import Multistart as Multistart
from hypergrad.outer.multistart import multistart as multistart
from hypergrad.outer.tune import tune as tune
