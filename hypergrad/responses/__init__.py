"""How parameters respond to hyperparameters, as a function that is learned: each function returns a `Response`."""

from hypergrad.responses._response import Response as Response
from hypergrad.responses._response import Weights as Weights
from hypergrad.responses.linear import linear as linear
from hypergrad.responses.mlp import mlp as mlp
from hypergrad.responses.structured import structured as structured
