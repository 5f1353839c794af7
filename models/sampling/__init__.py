"""Sampling from autoregressive generators; `config` is free of torch."""
