"""Models in GGUF files: the header by hand, weights and vocabulary through transformers' reader."""
