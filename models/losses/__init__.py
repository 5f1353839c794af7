"""Losses that compare reconstructions with images."""
