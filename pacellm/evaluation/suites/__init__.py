"""A module for each suite: what is asked, and how answers are scored."""
