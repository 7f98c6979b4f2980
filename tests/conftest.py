"""Settings for every test."""

import ctypes
import ctypes.util
import gc
import logging
import sys

import pytest
import torch
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, database=None)
settings.register_profile("fresh", derandomize=False)
settings.load_profile("repeatable")  # the same examples for everyone; `make fuzz` looks for new ones


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Tiny models only lose time with more; tests that are about threads set their own number."""
    torch.set_num_threads(1)
    gc.freeze()  # what was imported is never garbage: collections stay cheap


@pytest.fixture(autouse=True, scope="module")
def _memory_goes_back():
    """Servers of a module leave threads' heaps half full: without this a test process grows to gigabytes."""
    yield
    gc.collect()
    if sys.platform == "linux" and (library := ctypes.util.find_library("c")) is not None:
        trim = getattr(ctypes.CDLL(library), "malloc_trim", None)
        if trim is not None:  # musl has none
            trim(0)


@pytest.fixture
def root_logger():
    """``serve`` sets it up for good; the stream that it writes to in a test ends with the test."""
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
