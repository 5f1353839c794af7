"""From published weight files to our networks: recognised by names and shapes of their tensors; strict."""
