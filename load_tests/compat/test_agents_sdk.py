"""openai-agents, over chat and over responses: ``pytest load_tests/compat/test_agents_sdk.py``."""

import asyncio

import agents
import openai
import pytest
import weather_agent
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
)
from conftest import KEY, URL

agents.set_tracing_disabled(True)


@pytest.mark.parametrize("kind", [OpenAIChatCompletionsModel, OpenAIResponsesModel])
@pytest.mark.parametrize("is_streamed", [False, True])
def test_agent(kind, is_streamed):
    weather_agent.asked.clear()

    async def run():
        client = openai.AsyncOpenAI(base_url=URL, api_key=KEY, max_retries=0, timeout=300)
        agent = Agent(
            name="weather", tools=[function_tool(weather_agent.get_weather)],
            model=kind(model=weather_agent.MODEL, openai_client=client),
            model_settings=ModelSettings(temperature=0, max_tokens=100),
        )  # fmt: skip
        if not is_streamed:
            return (await Runner.run(agent, weather_agent.QUESTION, max_turns=3)).final_output
        result = Runner.run_streamed(agent, weather_agent.QUESTION, max_turns=3)
        assert len([event async for event in result.stream_events()]) > 5
        return result.final_output

    weather_agent.check(asyncio.run(run()))
