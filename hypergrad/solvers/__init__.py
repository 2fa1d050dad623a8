"""How the dependence of the solution on the hyperparameters is differentiated: each function returns a `Solver`."""
