"""The engine: what runs next, on which memory, for whom. Plain bookkeeping; torch where tokens become tensors."""
