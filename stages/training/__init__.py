"""The one training engine: tokenizers, generators and classifiers are tasks that it trains."""
