"""Outer losses that are not a validation loss: for data that are too few, or too dear, to set some aside."""

from hypergrad.objectives._kernel import log_determinant as log_determinant
from hypergrad.objectives.elbo import Posterior as Posterior
from hypergrad.objectives.elbo import elbo as elbo
from hypergrad.objectives.elbo import posterior as posterior
from hypergrad.objectives.elbo import prior_variances as prior_variances
from hypergrad.objectives.evidence import Losses as Losses
from hypergrad.objectives.evidence import evidence as evidence
from hypergrad.objectives.function_distance import FunctionMoments as FunctionMoments
from hypergrad.objectives.function_distance import exact_function_distance as exact_function_distance
from hypergrad.objectives.function_distance import function_distance as function_distance
from hypergrad.objectives.function_distance import function_moments as function_moments
from hypergrad.objectives.function_distance import ntk_function_distance as ntk_function_distance
from hypergrad.objectives.interleaved import interleaved as interleaved
from hypergrad.objectives.risk import Smoother as Smoother
from hypergrad.objectives.risk import calibration_error as calibration_error
from hypergrad.objectives.risk import gcv as gcv
from hypergrad.objectives.risk import leave_one_out as leave_one_out
from hypergrad.objectives.risk import press as press
from hypergrad.objectives.risk import ridge_smoother as ridge_smoother
from hypergrad.objectives.risk import sure as sure
from hypergrad.objectives.several import between as between
from hypergrad.objectives.several import pareto as pareto
from hypergrad.objectives.several import several as several
from hypergrad.objectives.several import simplex_grid as simplex_grid
from hypergrad.objectives.several import with_weights as with_weights
