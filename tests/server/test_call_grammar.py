"""Arguments come out as the model wrote them, in every form, whatever they contain and however the text is cut."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pacellm.demo import MODEL_PATH
from pacellm.server.writing.parsers import DialectParser, GenericToolParser, PlainParser, ToolListParser
from pacellm.text.tokenizer import ChatTokenizer
from tests.server.talk import HERMES

MARKS = (
    "</tool_call>", "<tool_call>", "\n</tool_call>\n", "}}\n</tool_call>", '"', "\\", '\\"}', "é", "\u2028", "😀",
    "\x01", "<|end|>", "<answer>", "</answer>", "[/CALLS]", "'", "), f(", "  ", "\n", "\t", "]", "}", "{", ",", ":",
)  # fmt: skip
TAGS = (
    "</function>",
    "</function>\n</tool_call>",
    "<function=g>",
    "</tool_call>",
    "</parameter> ",
    "<parameter=",
    "\n\n",
)
BEGINNINGS = ("<tool_call>", '{"name": "f", "arguments": ', "[CALLS][f(", "<function=f>")
texts = st.lists(st.sampled_from(MARKS) | st.text(max_size=3), max_size=6).map("".join)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(1 - 2**53, 2**53 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
arguments = st.dictionaries(texts, values, max_size=4)
calls = st.lists(st.tuples(st.sampled_from(["f", "get_weather"]), arguments), min_size=1, max_size=3)
cuts = st.lists(st.integers(1, 9), min_size=1, max_size=20)

TAGGED = "{{ tools }}{{ tool_calls }}<tool_call><function=x><parameter=y></tool_call>"
PYTHON = {
    "start_anchor_pattern": r"\A",
    "fields": {
        "tool_calls": {
            "open": "[CALLS]", "close": "[/CALLS]", "content": "python-call-list", "transform_each": True,
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{arguments}"}},
        },
        "content": {"content": "text"},
    },
}  # fmt: skip
JSON = {
    "start_anchor_pattern": r"\A",
    "fields": {
        "tool_calls": {
            "open_pattern": r"<tool_call>(?P<name>\w+)", "close": "</tool_call>", "content": "json", "repeats": True,
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"content": "text"},
    },
}  # fmt: skip


def tokenizer(**files):
    made = ChatTokenizer(MODEL_PATH)
    for name, value in files.items():
        setattr(made._tokenizer, name, value)
    return made


TOKENIZERS = {
    "hermes": tokenizer(chat_template=HERMES),
    "tagged": tokenizer(chat_template=TAGGED),
    "json": tokenizer(response_template=JSON),
    "python": tokenizer(response_template=PYTHON),
}


def reader(name, tools=()):
    """Of one answer."""
    if name in ("list", "generic"):
        return (ToolListParser if name == "list" else GenericToolParser)(PlainParser())
    made = TOKENIZERS[name]
    return DialectParser(made.response_parser(made.dialect, "", list(tools), continues=False), made.dialect, ())


def read(parser, text, sizes):
    """Content, and calls as (name, arguments)."""
    content, found, place, number = "", [], 0, 0
    deltas = []
    while place < len(text):
        size = sizes[number % len(sizes)]
        deltas += parser.push(text[place : place + size])
        place, number = place + size, number + 1
    for delta in [*deltas, *parser.finish()]:
        content += delta.get("content", "")
        for piece in delta.get("tool_calls", ()):
            if "id" in piece:
                found.append([piece["function"]["name"], ""])
            found[piece["index"]][1] += piece["function"]["arguments"]
    return content, found


def python_value(value):
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)}: {python_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(python_value, value)) + "]"
    return json.dumps(value) if not isinstance(value, bool | None) else repr(value)


def written(name, made, ascii_only=False):
    """Calls in a form."""
    dumped = [(function, json.dumps(value, ensure_ascii=ascii_only)) for function, value in made]
    whole = [f'{{"name": "{function}", "arguments": {text}}}' for function, text in dumped]
    match name:
        case "hermes":
            return "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in whole)
        case "generic":
            return "\n".join(f"<tool_call>{text}</tool_call>" for text in whole)
        case "list":
            return f"[{', '.join(whole)}]"
        case "json":
            return "".join(f"<tool_call>{function}{text}</tool_call>" for function, text in dumped)
    pairs = [(f, ", ".join(f"{k}={python_value(v)}" for k, v in value.items())) for f, value in made]
    return "[CALLS][" + ", ".join(f"{function}({pair})" for function, pair in pairs) + "][/CALLS]"


@pytest.mark.parametrize("name", ["hermes", "generic", "list", "json"])
@settings(max_examples=150, deadline=None)
@given(made=calls, sizes=cuts, ascii_only=st.booleans())
def test_arguments_in_json_are_what_was_written(name, made, sizes, ascii_only):
    text = written(name, made, ascii_only)
    content, found = read(reader(name), text, sizes)
    assert [(function, json.loads(text)) for function, text in found] == made
    assert content.strip() == ""
    assert read(reader(name), text, [len(text)]) == (content, found)


@settings(max_examples=150, deadline=None)
@given(
    made=st.lists(
        st.tuples(st.just("f"), st.dictionaries(st.from_regex("[a-z]{1,3}", fullmatch=True), values)), min_size=1
    ),
    sizes=cuts,
)
def test_arguments_in_python_are_what_was_written(made, sizes):
    text = written("python", made)
    content, found = read(reader("python"), text, sizes)
    assert [(function, json.loads(text)) for function, text in found] == made
    assert content.strip() == ""
    assert read(reader("python"), text, [len(text)]) == (content, found)


tagged_texts = st.lists(st.sampled_from(TAGS + MARKS) | st.text(max_size=3), max_size=6).map("".join)
KEYS = ("text", "number", "flag", "list", "object")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {
                "type": "object",
                "properties": dict(
                    zip(KEYS, ({"type": t} for t in ("string", "number", "boolean", "array", "object")), strict=True)
                ),
            },
        },
    }
]
tagged = st.fixed_dictionaries(
    {},
    optional={
        "text": tagged_texts, "number": st.integers() | st.floats(allow_nan=False, allow_infinity=False),
        "flag": st.booleans(), "list": st.lists(values, max_size=3), "object": arguments,
    },
)  # fmt: skip


@example(made=[{"number": 2**53 + 1}], sizes=[1000])
@settings(max_examples=300, deadline=None)
@given(made=st.lists(tagged, min_size=1, max_size=3), sizes=cuts)
def test_arguments_in_tags_are_what_was_written(made, sizes):
    text = ""
    for values in made:
        lines = (
            f"<parameter={key}>\n{value if isinstance(value, str) else json.dumps(value)}\n</parameter>\n"
            for key, value in values.items()
        )
        text += f"<tool_call>\n<function=f>\n{''.join(lines)}</function>\n</tool_call>\n"
    content, found = read(reader("tagged", TOOLS), text, sizes)
    assert [json.loads(arguments) for _, arguments in found] == made
    assert content.strip() == ""
    assert read(reader("tagged", TOOLS), text, [len(text)]) == (content, found)


@pytest.mark.parametrize("name", ["hermes", "tagged", "json", "python", "list", "generic"])
@settings(max_examples=150, deadline=None)
@given(text=st.lists(st.sampled_from((*MARKS, *TAGS, *BEGINNINGS)), max_size=12).map("".join), sizes=cuts)
def test_any_text_is_read_the_same_streamed_or_not(name, text, sizes):
    assert read(reader(name, TOOLS), text, sizes) == read(reader(name, TOOLS), text, [max(1, len(text))])


@pytest.mark.parametrize(
    ("name", "text", "arguments"),
    [
        ("hermes", '<tool_call>\n{"name": "f", "arguments": {"a": "x</tool_call> y', '{"a": "x</tool_call> y'),
        ("tagged", "<tool_call>\n<function=f>\n<parameter=text>\na\n</parameter>\n<parameter=b>\nx", '{"text": "a"'),
        ("tagged", "<tool_call>\n<function=f>\n<parameter=text>\n  a ", "{"),
    ],
)  # fmt: skip
def test_a_call_that_was_cut_is_no_whole_call(name, text, arguments):
    for size in (1, 3, len(text)):
        assert read(reader(name, TOOLS), text, [size]) == ("", [["f", arguments]])


def test_a_text_that_json_has_not_ends_at_the_mark():
    """A quote that nothing closes on its line."""
    text = '<tool_call>\n{"name": "f", "arguments": {"a": "x}}\n</tool_call>\nMore.'
    content, [[name, _]] = read(reader("hermes"), text, [4])
    assert (content, name) == ("More.", "f")


def test_what_is_no_number_is_a_text():
    text = "<tool_call>\n<function=f>\n<parameter=list>\n[NaN, 1e999]\n</parameter>\n</function>\n</tool_call>"
    [[_, arguments]] = read(reader("tagged", TOOLS), text, [5])[1]
    assert json.loads(arguments, parse_constant=pytest.fail) == {"list": ["NaN", "Infinity"]}


@pytest.mark.parametrize("name", ["hermes", "json", "python"])
def test_what_is_no_call_is_text_as_it_was_and_a_later_call_is_one(name):
    begin, end = ("[CALLS]", "[/CALLS]") if name == "python" else ("<tool_call>", "</tool_call>")
    bad = f"a {begin} none {end}"
    for size in (1, 4, 100):
        content, found = read(reader(name), bad + written(name, [("f", {"a": 1})]), [size])
        assert (content, found) == (bad, [["f", '{"a": 1}']])
