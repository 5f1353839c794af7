"""Generators of codes; `config` is free of torch, the networks are imported when they are built."""
