"""Codes: features, codebooks, and token sets made of images."""
