"""What happened, in numbers and pictures: `hg.check`, landscapes of the outer loss, plots of a run."""

from hypergrad.diagnostics import plots as plots
from hypergrad.diagnostics._report import Comparison as Comparison
from hypergrad.diagnostics._report import Leaf as Leaf
from hypergrad.diagnostics._report import Metasmoothness as Metasmoothness
from hypergrad.diagnostics._report import Report as Report
from hypergrad.diagnostics.check import check as check
from hypergrad.diagnostics.landscape import Landscape as Landscape
from hypergrad.diagnostics.landscape import landscape as landscape
