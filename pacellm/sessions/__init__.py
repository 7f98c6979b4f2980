"""What outlives a request: sessions, their logs and states in memory, on the host and on disk. Knows no HTTP."""
