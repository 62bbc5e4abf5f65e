"""Forward kernels of our own, for which every length and stride is data: one binary serves all shapes of a kind."""
