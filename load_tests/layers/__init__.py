"""The parts of ``load_tests/bank_layers.py``."""
