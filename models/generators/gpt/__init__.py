"""GPT: DiGIT's generators of semantic codes, and its pixel decoders (arXiv 2410.12490)."""
