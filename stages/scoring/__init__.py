"""Features of images under the extractors of torch-fidelity, and scores computed from features."""
