"""Quantizers: a latent grid to codes and back; all return `Quantized`."""
