"""From published weight files to our networks: what a state dict is, by its names and shapes; strict."""
