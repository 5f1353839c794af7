"""Samples: codes drawn from a generator, and images decoded from codes."""
