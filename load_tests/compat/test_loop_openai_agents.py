"""openai-agents' runner over chat and over responses, against a server with an instruct model whose template has no
tools: ``pytest load_tests/compat/test_loop_openai_agents.py``, see docs/compatibility.md."""

import asyncio
import json

import openai
import pytest
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from conftest import KEY, URL
from loops import FUNCTIONS, MAX_TOKENS, MAX_TURNS, Tally

set_tracing_disabled(True)


@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("kind", [OpenAIChatCompletionsModel, OpenAIResponsesModel], ids=["chat", "responses"])
def test_runner(kind, is_streamed):
    async def ask(question):
        async with openai.AsyncOpenAI(base_url=URL, api_key=KEY, max_retries=0) as client:
            name = (await client.models.list()).data[0].id
            agent = Agent(
                name="helper",
                model=kind(model=name, openai_client=client),
                model_settings=ModelSettings(temperature=0, max_tokens=MAX_TOKENS),
                tools=[function_tool(function) for function in FUNCTIONS],
            )
            if not is_streamed:
                return await Runner.run(agent, question, max_turns=MAX_TURNS)
            result = Runner.run_streamed(agent, question, max_turns=MAX_TURNS)
            async for _ in result.stream_events():
                pass
            return result

    def loop(question):
        result = asyncio.run(ask(question))
        items = [item.raw_item for item in result.new_items if item.type == "tool_call_item"]
        return [(item.name, json.loads(item.arguments)) for item in items], result.final_output

    way = "streamed" if is_streamed else "whole"
    Tally(f"openai-agents {'chat' if kind is OpenAIChatCompletionsModel else 'responses'}, {way}").run(loop).check()
