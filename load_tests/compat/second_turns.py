"""Two turns of every kind by each Python client, against ``first_turns.py``."""

from __future__ import annotations

import asyncio
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pydantic

KINDS = ("text", "reasoning", "call", "parallel", "cut", "no-arguments", "refusal", "structured")
URL, KEY = os.environ["PACELLM_URL"], "compatibility-key"
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}


class Trip(pydantic.BaseModel):
    """A structured answer."""

    city: str
    days: int


def get_weather(city: str) -> str:
    """The weather in a city."""
    return f"Sunny in {city}."


def results(calls: Any) -> Iterator[dict[str, Any]]:
    for call in calls or ():
        yield {"role": "tool", "tool_call_id": call.id, "content": "Sunny."}


def openai_python(kind: str) -> None:
    client, asked = openai.OpenAI(base_url=URL, api_key=KEY, max_retries=0), [{"role": "user", "content": "?"}]
    more: dict[str, Any] = {"model": kind, "tools": [TOOL]}

    def again(message: Any) -> None:
        client.chat.completions.create(messages=[*asked, message, *results(message.tool_calls), *asked], **more)
        dumped = message.model_dump()
        client.chat.completions.create(messages=[*asked, dumped, *results(message.tool_calls), *asked], **more)

    again(client.chat.completions.create(messages=asked, **more).choices[0].message)
    strict = {**TOOL, "function": {**TOOL["function"], "strict": True}}
    form = {"response_format": Trip} if kind == "structured" else {}
    if kind not in ("cut", "no-arguments"):
        again(client.chat.completions.parse(messages=asked, model=kind, tools=[strict], **form).choices[0].message)
        with client.chat.completions.stream(messages=asked, model=kind, tools=[strict], **form) as stream:
            again(stream.get_final_completion().choices[0].message)
    flat = {"type": "function", **TOOL["function"]}
    for response in (
        client.responses.create(input=asked, model=kind, tools=[flat]),
        client.responses.parse(
            input=asked, model=kind, tools=[{**flat, "strict": True}], **({"text_format": Trip} if form else {})
        ),
    ):
        outputs = [
            {"type": "function_call_output", "call_id": one.call_id, "output": "Sunny."}
            for one in response.output if one.type == "function_call"
        ]  # fmt: skip
        client.responses.create(input=[*asked, *response.output, *outputs, *asked], model=kind, tools=[flat])
        dumped = [one.model_dump() for one in response.output]
        client.responses.create(input=[*asked, *dumped, *outputs, *asked], model=kind, tools=[flat])


def langchain(kind: str) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI

    for is_responses in (False, True):
        model = ChatOpenAI(model=kind, base_url=URL, api_key=KEY, max_retries=0, use_responses_api=is_responses)
        bound = (
            model.with_structured_output(Trip, include_raw=True)
            if kind == "structured"
            else model.bind_tools([tool(get_weather)])
        )
        for is_streamed in (False, True):
            asked = [HumanMessage("?")]
            if is_streamed and kind != "structured":
                said = None
                for chunk in bound.stream(asked):
                    said = chunk if said is None else said + chunk
            else:
                said = bound.invoke(asked)
            said = said["raw"] if kind == "structured" else said
            calls = [*said.tool_calls, *said.invalid_tool_calls]
            model.invoke([*asked, said, *(ToolMessage("Sunny.", tool_call_id=call["id"]) for call in calls), *asked])


def openai_agents(kind: str) -> None:
    import agents

    agents.set_tracing_disabled(True)
    client = openai.AsyncOpenAI(base_url=URL, api_key=KEY, max_retries=0)
    for model in (agents.OpenAIChatCompletionsModel, agents.OpenAIResponsesModel):
        agent = agents.Agent(
            name="helper", model=model(model=kind, openai_client=client), tools=[agents.function_tool(get_weather)],
            output_type=Trip if kind == "structured" else None,
        )  # fmt: skip
        for is_streamed in (False, True):

            async def run(agent: Any = agent, is_streamed: bool = is_streamed) -> None:
                said: Any
                if is_streamed:
                    said = agents.Runner.run_streamed(agent, "?", max_turns=2)
                    async for _ in said.stream_events():
                        pass
                else:
                    said = await agents.Runner.run(agent, "?", max_turns=2)
                await agents.Runner.run(agent, [*said.to_input_list(), {"role": "user", "content": "?"}], max_turns=2)

            attempt(lambda: asyncio.run(run()))


def pydantic_ai(kind: str) -> None:
    from pydantic_ai import Agent, PromptedOutput
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    client = openai.AsyncOpenAI(base_url=URL, api_key=KEY, max_retries=0)
    for model in (OpenAIChatModel, OpenAIResponsesModel):
        output = PromptedOutput(Trip) if kind == "structured" else str
        agent: Any = Agent(
            model(kind, provider=OpenAIProvider(openai_client=client)), tools=[get_weather], output_type=output
        )

        async def run(agent: Any = agent) -> None:
            said = await agent.run("?")
            await agent.run("?", message_history=said.all_messages())

        async def stream(agent: Any = agent) -> None:
            async with agent.run_stream("?") as said:
                await said.get_output()
            await agent.run("?", message_history=said.all_messages())

        attempt(lambda: asyncio.run(run()))
        attempt(lambda: asyncio.run(stream()))


def litellm(kind: str) -> None:
    import litellm as library

    more: dict[str, Any] = {
        "model": f"openai/{kind}",
        "base_url": URL,
        "api_key": KEY,
        "tools": [TOOL],
        "num_retries": 0,
    }
    asked = [{"role": "user", "content": "?"}]
    for provider in ("openai", "hosted_vllm"):
        more["model"] = f"{provider}/{kind}"
        message = library.completion(messages=asked, **more).choices[0].message
        library.completion(messages=[*asked, message, *results(message.tool_calls), *asked], **more)
        library.completion(messages=[*asked, message.model_dump(), *results(message.tool_calls), *asked], **more)
        chunks = list(library.completion(messages=asked, stream=True, **more))
        message = library.stream_chunk_builder(chunks).choices[0].message
        library.completion(messages=[*asked, message, *results(message.tool_calls), *asked], **more)


def attempt(run: Callable[[], Any]) -> None:
    """A client may give up on its own."""
    try:
        run()
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        print(f"  {type(error).__name__}: {str(error)[:150]!r} ({last.filename.rsplit('/', 2)[-1]}:{last.lineno})")


def main() -> None:
    """One client's turns."""
    for kind in KINDS:
        print(sys.argv[1], kind)
        attempt(lambda: globals()[sys.argv[1]](kind))  # noqa: B023


if __name__ == "__main__":
    main()
