"""Cortical Experts: FFN neurons in clusters of equal size, side by side. Knows tensors, no transformers, no HTTP."""
