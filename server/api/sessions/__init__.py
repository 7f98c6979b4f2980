"""Sessions as things of their own."""
