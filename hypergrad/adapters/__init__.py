"""Models and tools of other libraries; each needs its library as an extra, and is imported on its own.

`hypergrad.adapters.nnx`, `linen` and `equinox`: a model as parameters, a model state and two functions.
`hypergrad.adapters.sklearn`: estimators that tune their penalties, length scales and weight decays while they fit.
`hypergrad.adapters.optuna`: trials whose continuous hyperparameters are polished by hypergradients.
`hypergrad.adapters.trackers`: callbacks for TensorBoard, Weights & Biases and MLflow.
"""
