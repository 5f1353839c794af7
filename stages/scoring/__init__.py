"""What scores are made of: feature extractors registered with torch-fidelity, and the figures computed from features."""
