"""What a body's bytes tell of its cost, against what a parser finds."""

import json
import random

import pytest

from pacellm.errors import BodyTooLarge, RequestError
from pacellm.server import json_shape
from pacellm.server.api.chat.schema import parse_chat
from pacellm.server.api.completions.schema import parse_completion
from pacellm.server.api.tokens.schema import parse_tokenize
from pacellm.server.json_shape import MAX_DEPTH, MAX_PAIRS, shape_of

STRINGS = ["", "a", 'quote " here', "back\\slash", "\\", '\\"', "[{,:}]", "\n", "é", "漢字", "😀", "\\\\\\", "\ud800"]


def value_of(rng, depth=0):
    kind = rng.random()
    if depth > 4 or kind < 0.5:
        return rng.choice([rng.choice(STRINGS) * rng.randint(1, 3), rng.randint(0, 9999), True, None, 0.5])
    if kind < 0.75:
        return [value_of(rng, depth + 1) for _ in range(rng.randint(0, 5))]
    return {f"{rng.choice(STRINGS)}{number}": value_of(rng, depth + 1) for number in range(rng.randint(0, 4))}


def counted(value):
    """(depth, values without keys, pairs, containers)"""
    if isinstance(value, dict):
        below = [counted(one) for one in value.values()]
        pairs = len(value)
    elif isinstance(value, list):
        below, pairs = [counted(one) for one in value], 0
    else:
        return 0, 1, 0, 0
    return (
        1 + max((one[0] for one in below), default=0),
        1 + sum(one[1] for one in below),
        pairs + sum(one[2] for one in below),
        1 + sum(one[3] for one in below),
    )


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("block", [1, 2, 3, 7, 2**18])
def test_shapes_are_those_of_what_is_parsed(seed, block, monkeypatch):
    monkeypatch.setattr(json_shape, "_BLOCK", block)
    rng = random.Random(seed)
    value = [value_of(rng) for _ in range(8)]
    is_ascii = bool(seed % 2)
    text = json.dumps(value, ensure_ascii=is_ascii, indent=rng.choice([None, 1]))
    found, (depth, values, pairs, containers) = shape_of(text.encode("utf-8", "surrogatepass")), counted(value)
    assert (found.depth, found.pairs, found.containers) == (depth, pairs, containers)
    assert values <= found.values <= values + 1 + containers
    assert found.characters == len(text)
    widest = max(map(ord, json.dumps(value, ensure_ascii=False)))
    assert max(found.width, found.widest) >= (1 if widest < 256 else 2 if widest < 65536 else 4)
    assert found.characters - found.escaped <= len(text)


def test_what_is_no_json_has_a_shape_too():
    for body in (b"", b"\\", b'"', b"]]]", b'"\\', b"\\u", b"\xff\xfe", b'{"a', b'\\"' * 99):
        assert shape_of(body).depth <= 1


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"[" * (MAX_DEPTH + 1), "deeper"),
        (b'{"a":' * (MAX_DEPTH + 1), "deeper"),
        (b"{" + b'"a":1,' * (MAX_PAIRS + 1), "keys"),
        (b"[" + b"{}," * 70_000, "objects and lists"),
        (b"[" + b"1," * 1_800_000, "values"),
        (b'"' + b"x" * 17 * 2**20 + "😀".encode() + b'"', "characters of 4 bytes"),
        (b'"' + b"x" * 17 * 2**20 + b'\\ud83d\\ude00"', "characters of 4 bytes"),
        (b'"' + b"x" * 33 * 2**20 + b'\\u0416"', "characters of 2 bytes"),
    ],
)
def test_what_costs_too_much_is_refused(body, says):
    with pytest.raises(RequestError) as caught:
        shape_of(body, limit=2**20)
    assert caught.value.code == "body_too_complex"
    assert isinstance(caught.value, BodyTooLarge) == (says not in ("deeper", "keys"))


def test_what_clients_send_passes():
    message = {"role": "user", "content": [{"type": "text", "text": "hi"}]}
    shape_of(json.dumps({"messages": [message] * 16_384}).encode(), limit=2**20)
    shape_of(json.dumps({"prompt": [50_000] * 2**20}).encode(), limit=2**20)
    shape_of(b'{"prompt": "' + b"x" * (60 * 2**20) + b'"}', limit=64 * 2**20)


def test_wrong_lists_have_one_problem():
    """Each problem of a list is described; a million of them take seconds and gigabytes."""
    for parse, body in (
        (parse_completion, {"prompt": ["a"] * 1000}),
        (parse_completion, {"prompt": [[1]] * 1000 + ["a"]}),
        (parse_tokenize, {"prompt": "a", "messages": [{"role": "x"}] * 1000}),
        (parse_chat, {"messages": [{"role": "user", "content": [{}] * 1000}]}),
    ):
        with pytest.raises(RequestError) as caught:
            parse(json.dumps(body).encode())
        assert caught.value.param


def test_an_object_has_so_many_keys():
    with pytest.raises(RequestError) as caught:
        parse_chat(json.dumps({"messages": [], "logit_bias": {str(n): 1 for n in range(5000)}}).encode())
    assert caught.value.code == "body_too_complex"


def test_arguments_of_calls_are_json_too():
    with pytest.raises(RequestError) as caught:
        parse_chat(called("[" + "[]," * 200_000 + "[]]"))
    assert caught.value.code == "body_too_complex"


@pytest.mark.parametrize("arguments", ["[" * 500 + "]" * 500, '{"a":' * 20_000 + "1" + "}" * 20_000])
def test_arguments_that_are_nested_too_deep_are_text(arguments):
    body = parse_chat(called(arguments))
    assert body.messages[0].tool_calls[0].function.read() is None


def called(arguments):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return json.dumps({"messages": [{"role": "assistant", "tool_calls": [call]}]}).encode()
