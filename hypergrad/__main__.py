"""`python -m hypergrad` tunes hyperparameters by gradient on real data, in under a minute."""

from __future__ import annotations

import sys

from hypergrad._demo.cli import main

if __name__ == "__main__":
    sys.exit(main())
