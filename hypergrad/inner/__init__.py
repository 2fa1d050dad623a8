"""How parameters are found: each function returns an `Inner`."""
