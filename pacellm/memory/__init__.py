"""Persistent Activity: banks of FFN activations. Knows tensors only, no transformers and no HTTP."""
