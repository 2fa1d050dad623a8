"""Training steps and their derivatives, from which `hg.unrolled` is built."""
