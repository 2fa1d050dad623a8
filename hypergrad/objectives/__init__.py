"""Outer losses that are not a validation loss: for data that are too few, or too dear, to set some aside."""
