"""Models of other libraries as parameters, a model state and two functions; each needs its library as an extra.

`hypergrad.adapters.nnx`, `hypergrad.adapters.linen` and `hypergrad.adapters.equinox` are imported one by one.
"""
