"""Sampling codes from a generator, and decoding codes to images."""
