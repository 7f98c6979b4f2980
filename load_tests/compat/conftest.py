"""Where the server is: ``PACELLM_URL`` and ``PACELLM_KEY``; docs/compatibility.md has the commands."""

import os

import pytest

URL = os.environ.get("PACELLM_URL", "http://127.0.0.1:8000/v1")
KEY = os.environ.get("PACELLM_KEY", "compatibility-key")
FACT = "The access code of the amber archive is 48213.\n\nWhat is the access code of the amber archive?"


@pytest.fixture
def question() -> list[dict[str, str]]:
    """A conversation whose answer the bundled model knows: it has 48213 in it."""
    return [{"role": "user", "content": FACT}]


@pytest.fixture
def weather_tool() -> dict:
    """A tool in OpenAI's form."""
    parameters = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}, "unit": {"enum": ["C", "F"]}},
        "required": ["city", "unit"],
        "additionalProperties": False,
    }
    return {
        "type": "function",
        "function": {"name": "weather", "description": "The weather in a city.", "parameters": parameters},
    }
