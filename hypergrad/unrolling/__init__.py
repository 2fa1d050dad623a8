"""One step of training and its derivatives: to `hg.unrolled` what `linear` is to `hg.implicit`."""
