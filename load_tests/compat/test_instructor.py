"""instructor against a running server: ``pytest load_tests/compat/test_instructor.py``, see docs/compatibility.md."""

from typing import Literal

import instructor
import openai
import pytest
from conftest import KEY, URL
from pydantic import BaseModel, ConfigDict

MODES = [instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA]


class Fruit(BaseModel):
    """A fruit. Without ``extra="forbid"`` its schema allows more properties, and the bundled model makes some up."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["apple", "pear"]
    ripe: bool


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.value)
def test_form(mode, question):
    with openai.OpenAI(base_url=URL, api_key=KEY) as client:
        chat = instructor.from_openai(client, mode=mode).chat.completions
        found = chat.create(model="pacellm-demo", messages=question, response_model=Fruit, max_tokens=200)
    assert isinstance(found, Fruit)
