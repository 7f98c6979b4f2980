"""transformers models under PaceLLM: loading, patching, attention. The only place that imports transformers,
beside ``pacellm/text/tokenizer.py``."""
