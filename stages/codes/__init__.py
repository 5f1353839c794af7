"""From images to features, codebooks and token sets."""
