"""Settings for every test."""

import gc

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Tiny models only lose time with more; tests that are about threads set their own number."""
    torch.set_num_threads(1)
    gc.freeze()  # what was imported is never garbage: collections stay cheap
