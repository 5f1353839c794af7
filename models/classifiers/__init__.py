"""Classifiers, which score samples of image sets that no published classifier was trained on."""
