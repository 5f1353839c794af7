"""RAR: randomized autoregressive generation (arXiv 2411.00776)."""
