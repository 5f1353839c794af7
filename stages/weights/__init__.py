"""Weights: published files, and the networks in artifacts."""
