"""This project's own models: the name clashes with nothing in smalti."""
