"""Completions of text."""
