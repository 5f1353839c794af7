"""The training engine, and the trainings of tokenizers, generators and classifiers as its tasks."""
