"""The modules that read or rewrite traced programs: sensitivities, labels, gradients, optimizers, convolutions."""
