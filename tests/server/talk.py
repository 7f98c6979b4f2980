"""Tools, templates and what tests ask and make of answers with calls."""

import json

import jsonschema

from tests.server.conftest import NAME

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a place",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string", "maxLength": 10}, "unit": {"enum": ["C", "F"]}},
            "required": ["place", "unit"],
            "additionalProperties": False,
        },
    },
}
DICE = {"type": "function", "function": {"name": "roll-dice"}}
PARAMETERS = {"get_weather": WEATHER["function"]["parameters"], "roll-dice": {"type": "object", "maxProperties": 0}}

# as Qwen's: a template that shows tools, calls, results and reasoning
HERMES = """\
{%- if tools %}{{- '<|system|>' }}{% for tool in tools %}{{- tool | tojson }}{% endfor %}{{- '<|end|>' }}{% endif -%}
{%- for message in messages -%}
{{- '<|user|>' if message.role == 'tool' else '<|' + message.role + '|>' -}}
{%- if message.reasoning_content %}{{- '<think>' + message.reasoning_content + '</think>' }}{% endif -%}
{{- message.content -}}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) }}
{{- '}\\n</tool_call>' }}{% endfor -%}
{{- '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{% if thinking %}{{- '<think>\\n' }}{% endif %}{% endif -%}
"""
RESPONSE = {
    "start_anchor": "<|assistant|>",
    "fields": {
        "thinking": {"open": "[[", "close": "]]", "content": "text"},
        "tool_calls": {
            "open_pattern": r"CALL (?P<name>\w+):", "close": ";", "repeats": True, "content": "kv-lines",
            "content_args": {"line_sep": ",", "kv_sep": "="},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"content": "text"},
    },
}  # fmt: skip


def user(text):
    return [{"role": "user", "content": text}]


def ask(server, **changes):
    body = {"model": NAME, "messages": user("How is the weather?"), "max_tokens": 150, **changes}
    return server.client.chat.completions.create(**body)


def folded(chunks, index=0):
    """What a client makes of a stream: content, reasoning, calls as (name, arguments), reason."""
    content, reasoning, calls, reason = "", "", {}, None
    for chunk in chunks:
        for choice in chunk.choices:
            if choice.index != index:
                continue
            content += choice.delta.content or ""
            reasoning += getattr(choice.delta, "reasoning_content", None) or ""
            for piece in choice.delta.tool_calls or ():
                if piece.id is not None:
                    assert piece.function.arguments == ""
                    assert piece.index == len(calls)
                    calls[piece.index] = [piece.function.name, ""]
                calls[piece.index][1] += piece.function.arguments
            reason = choice.finish_reason or reason
    return content, reasoning, [tuple(call) for call in calls.values()], reason


def parts(choice):
    message = choice.message
    calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]
    return message.content or "", getattr(message, "reasoning_content", None) or "", calls, choice.finish_reason


def check(calls):
    for name, arguments in calls:
        jsonschema.validate(json.loads(arguments), PARAMETERS[name])


def function(**changes):
    return {"type": "function", "function": {"name": "f", **changes}}


CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
