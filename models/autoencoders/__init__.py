"""Autoencoders: pixels to a latent grid and back, each in the pixel range that its config names."""
