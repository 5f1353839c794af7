"""Networks, no files: encoders, autoencoders, quantizers, generators, classifiers, losses, sampling."""
