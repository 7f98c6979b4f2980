"""openai-python's tool loops, chat whole and streamed and responses, against a server with an instruct model whose
template has no tools: ``pytest load_tests/compat/test_loop_openai.py``, see docs/compatibility.md."""

import inspect
import json

import openai
import pytest
from conftest import KEY, URL
from loops import FUNCTIONS, MAX_TOKENS, MAX_TURNS, Tally

NAMED = {function.__name__: function for function in FUNCTIONS}
KINDS = {str: "string", float: "number"}


def schema(function):
    """A function in OpenAI's form."""
    names = inspect.signature(function, eval_str=True).parameters
    properties = {name: {"type": KINDS[parameter.annotation]} for name, parameter in names.items()}
    parameters = {"type": "object", "properties": properties, "required": list(names), "additionalProperties": False}
    return {"name": function.__name__, "description": function.__doc__, "parameters": parameters}


TOOLS = [{"type": "function", "function": schema(function)} for function in FUNCTIONS]


@pytest.fixture(scope="module")
def client():
    with openai.OpenAI(base_url=URL, api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def model(client):
    return client.models.list().data[0].id


def made(call):
    arguments = json.loads(call.arguments)
    return (call.name, arguments), NAMED[call.name](**arguments)


@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "streamed"])
def test_chat(client, model, is_streamed):
    def message_of(messages):
        body = {"model": model, "messages": messages, "tools": TOOLS, "temperature": 0, "max_tokens": MAX_TOKENS}
        if not is_streamed:
            return client.chat.completions.create(**body).choices[0].message
        with client.chat.completions.stream(**body) as stream:
            stream.until_done()
            return stream.get_final_completion().choices[0].message

    def loop(question):
        messages, calls = [{"role": "user", "content": question}], []
        for _ in range(MAX_TURNS):
            message = message_of(messages)
            if not message.tool_calls:
                return calls, message.content
            messages.append(message)
            for call in message.tool_calls:
                found, result = made(call.function)
                calls.append(found)
                messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        raise RuntimeError("no end")

    Tally(f"openai chat, {'streamed' if is_streamed else 'whole'}").run(loop).check()


def test_responses(client, model):
    tools = [{"type": "function", **tool["function"]} for tool in TOOLS]

    def loop(question):
        new, last, calls = question, None, []
        for _ in range(MAX_TURNS):
            answer = client.responses.create(
                model=model, input=new, tools=tools, temperature=0, max_output_tokens=MAX_TOKENS,
                previous_response_id=last,
            )  # fmt: skip
            asked = [item for item in answer.output if item.type == "function_call"]
            if not asked:
                return calls, answer.output_text
            new, last = [], answer.id
            for item in asked:
                found, result = made(item)
                calls.append(found)
                new.append({"type": "function_call_output", "call_id": item.call_id, "output": result})
        raise RuntimeError("no end")

    Tally("openai responses").run(loop).check()
