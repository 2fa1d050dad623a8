"""Outer losses that are not a validation loss: for data that are too few, or too dear, to set some aside."""

from hypergrad.objectives.risk import Smoother as Smoother
from hypergrad.objectives.risk import calibration_error as calibration_error
from hypergrad.objectives.risk import gcv as gcv
from hypergrad.objectives.risk import leave_one_out as leave_one_out
from hypergrad.objectives.risk import press as press
from hypergrad.objectives.risk import ridge_smoother as ridge_smoother
from hypergrad.objectives.risk import sure as sure
