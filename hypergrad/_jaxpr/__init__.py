"""Everything that reads a traced program: what reaches what, labels, derivatives of optimizers."""
