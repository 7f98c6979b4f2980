"""Settings for every test."""

import gc
import logging

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Tiny models only lose time with more; tests that are about threads set their own number."""
    torch.set_num_threads(1)
    gc.freeze()  # what was imported is never garbage: collections stay cheap


@pytest.fixture
def root_logger():
    """``serve`` sets it up for good; the stream that it writes to in a test ends with the test."""
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
