"""Baselines whose logits are a table: the histogram of codes, and uniform codes."""
