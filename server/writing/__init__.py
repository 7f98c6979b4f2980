"""The engine's events to the pieces of an answer, and those to HTTP."""
