"""Makes the network lose less: equalization, bias correction, rounding of weights."""
