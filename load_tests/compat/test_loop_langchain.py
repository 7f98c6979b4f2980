"""langchain's agent over langchain-openai, whole and streamed, against a server with an instruct model whose template
has no tools: ``pytest load_tests/compat/test_loop_langchain.py``, see docs/compatibility.md."""

import openai
import pytest
from conftest import KEY, URL
from langchain.agents import create_agent
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from loops import FUNCTIONS, MAX_TOKENS, MAX_TURNS, Tally


@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "streamed"])
def test_agent(is_streamed):
    with openai.OpenAI(base_url=URL, api_key=KEY) as client:
        name = client.models.list().data[0].id
    model = ChatOpenAI(
        model=name, base_url=URL, api_key=KEY, max_retries=0, temperature=0, max_completion_tokens=MAX_TOKENS,
        streaming=is_streamed,
    )  # fmt: skip
    agent = create_agent(model, [tool(function) for function in FUNCTIONS])

    def loop(question):
        asked = {"messages": [{"role": "user", "content": question}]}
        messages = agent.invoke(asked, {"recursion_limit": 2 * MAX_TURNS})["messages"]
        calls = [call for message in messages for call in getattr(message, "tool_calls", ())]
        return [(call["name"], call["args"]) for call in calls], messages[-1].text

    Tally(f"langchain, {'streamed' if is_streamed else 'whole'}").run(loop).check()
