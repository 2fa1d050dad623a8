"""Numbers and pictures of what happened: `hg.check`, attribution to examples, overtuning, landscapes, plots."""

from hypergrad.diagnostics import plots as plots
from hypergrad.diagnostics._report import Comparison as Comparison
from hypergrad.diagnostics._report import Leaf as Leaf
from hypergrad.diagnostics._report import Metasmoothness as Metasmoothness
from hypergrad.diagnostics._report import Report as Report
from hypergrad.diagnostics.attribution import Attribution as Attribution
from hypergrad.diagnostics.attribution import Top as Top
from hypergrad.diagnostics.attribution import attribute as attribute
from hypergrad.diagnostics.check import check as check
from hypergrad.diagnostics.landscape import Landscape as Landscape
from hypergrad.diagnostics.landscape import landscape as landscape
from hypergrad.diagnostics.overtuning import Overtuning as Overtuning
from hypergrad.diagnostics.overtuning import overtuning as overtuning
from hypergrad.diagnostics.retraining import Retrained as Retrained
from hypergrad.diagnostics.retraining import lds as lds
from hypergrad.diagnostics.retraining import loo_correlation as loo_correlation
from hypergrad.diagnostics.retraining import retrain as retrain
