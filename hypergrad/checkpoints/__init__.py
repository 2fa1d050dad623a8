"""Stores of pytrees, each of which is whole or absent. They know nothing about the run that they serve."""

from hypergrad.checkpoints._durable import CheckpointError as CheckpointError
from hypergrad.checkpoints.checkpoint import Loaded as Loaded
from hypergrad.checkpoints.checkpoint import Store as Store
from hypergrad.checkpoints.checkpoint import load as load
from hypergrad.checkpoints.checkpoint import save as save
from hypergrad.checkpoints.orbax import orbax as orbax
