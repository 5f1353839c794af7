"""Files, no networks: keys, artifacts, store, stages and recipes, the runner, shards, image sets. Imports no torch."""
