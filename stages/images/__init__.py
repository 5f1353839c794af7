"""Images: image sets, and images as arrays."""
