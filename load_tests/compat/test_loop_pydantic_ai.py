"""pydantic-ai's agent, whole and streamed, against a server with an instruct model whose template has no tools:
``pytest load_tests/compat/test_loop_pydantic_ai.py``, see docs/compatibility.md."""

import asyncio

import openai
import pytest
from conftest import KEY, URL
from loops import FUNCTIONS, MAX_TOKENS, MAX_TURNS, Tally
from pydantic_ai import Agent, UsageLimits
from pydantic_ai.messages import ToolCallPart
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "streamed"])
def test_agent(is_streamed):
    async def ask(question):
        async with openai.AsyncOpenAI(base_url=URL, api_key=KEY, max_retries=0) as client:
            name = (await client.models.list()).data[0].id
            model = OpenAIChatModel(name, provider=OpenAIProvider(openai_client=client))
            agent = Agent(model, tools=FUNCTIONS, model_settings={"temperature": 0, "max_tokens": MAX_TOKENS})
            limits = UsageLimits(request_limit=MAX_TURNS)
            if not is_streamed:
                result = await agent.run(question, usage_limits=limits)
                return result.all_messages(), result.output
            async with agent.run_stream(question, usage_limits=limits) as stream:
                text = "".join([piece async for piece in stream.stream_text(delta=True)])
                return stream.all_messages(), text

    def loop(question):
        messages, text = asyncio.run(ask(question))
        parts = [part for message in messages for part in message.parts if isinstance(part, ToolCallPart)]
        return [(part.tool_name, part.args_as_dict()) for part in parts], text

    Tally(f"pydantic-ai, {'streamed' if is_streamed else 'whole'}").run(loop).check()
