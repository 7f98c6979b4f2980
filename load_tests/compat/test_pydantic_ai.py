"""pydantic-ai, over chat and over responses: ``pytest load_tests/compat/test_pydantic_ai.py``."""

import pytest
import weather_agent
from conftest import KEY, URL
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider


@pytest.mark.parametrize("kind", [OpenAIChatModel, OpenAIResponsesModel])
def test_agent(kind):
    weather_agent.asked.clear()
    model = kind(weather_agent.MODEL, provider=OpenAIProvider(base_url=URL, api_key=KEY))
    settings = {"temperature": 0, "max_tokens": 100, "timeout": 300}
    agent = Agent(model, tools=[weather_agent.get_weather], model_settings=settings)
    weather_agent.check(agent.run_sync(weather_agent.QUESTION).output)
