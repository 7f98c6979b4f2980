"""Attention for every served architecture, by device: on CPU with the same bits in any company, on CUDA by kernels."""
