"""Load that no tool has, against a running server: each module is a scenario with a command line of its own, prints
what went wrong, one JSON line last, and exits non-zero where anything was lost or left over."""
