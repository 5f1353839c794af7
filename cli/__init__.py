"""The command line: text in, stage call out, sentence out."""
