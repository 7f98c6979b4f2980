"""What an agent of any library is to do: call ``get_weather`` by itself, get its result, answer with it.

``PACELLM_MODEL`` names the model; the bundled one cannot follow tools, SmolLM2-135M-Instruct can.
"""

import os

MODEL = os.environ.get("PACELLM_MODEL", "smollm2")
QUESTION = "Call get_weather for Paris."
RESULT = "sunny, 22 degrees"
asked: list[str] = []
"""Cities that the tool was called with."""


def get_weather(city: str) -> str:
    """Get the current weather in a city."""
    asked.append(city)
    return RESULT


TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather in a city.",
        "parameters": {
            "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"],
            "additionalProperties": False,
        },
    },
}  # fmt: skip


def check(answer: str) -> None:
    """The tool was called as it should, and its result is what was answered."""
    assert asked == ["Paris"]
    assert "22" in answer
    assert "<" not in answer
