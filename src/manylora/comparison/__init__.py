"""Methods at equal parameters, each at its own best rate, over several seeds, with intervals."""
