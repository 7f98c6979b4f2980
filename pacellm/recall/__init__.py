"""Working memory: what a token sees of a history that outgrew its budget, and how it is chosen."""
