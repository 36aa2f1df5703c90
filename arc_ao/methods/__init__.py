"""Which blocks get a residual, which scales blocks get, which recipe a model gets."""
