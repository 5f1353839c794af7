"""Classifiers: the judges of the recipes whose images no published network knows."""
