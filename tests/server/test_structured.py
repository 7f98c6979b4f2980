"""Answers in a form that was asked for, through the real client."""

import json
import re
import time
from typing import Annotated, Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

from tests.server.conftest import NAME

EACH = 8  # choices of one request
SCHEMAS = {
    "person": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "tags": {"type": "array", "items": {"enum": ["a", "b", "é\n\"'"]}, "maxItems": 3},
            "spouse": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/ref"}]},
        },
        "required": ["name", "age", "tags", "spouse"],
        "additionalProperties": False,
        "$defs": {"ref": {"type": "object", "properties": {"id": {"const": 7}}, "required": ["id"],
                          "additionalProperties": False}},
    },
    "numbers": {
        "type": "array", "items": {"type": "integer", "minimum": -5, "maximum": 99}, "minItems": 2, "maxItems": 4,
    },
    "formats": {
        "type": "object",
        "properties": {
            "when": {"type": "string", "format": "date"},
            "code": {"type": "string", "pattern": "^[A-Z]{2}[0-9]{3}$"},
            "flag": {"type": "boolean"},
        },
        "required": ["when", "code", "flag"],
        "additionalProperties": False,
    },
    "word": {"type": "string", "maxLength": 8},
}  # fmt: skip


def user(text):
    return [{"role": "user", "content": text}]


def ask(live, **changes):
    body = {"model": NAME, "messages": user("Tell me about the archive."), "max_tokens": 200, **changes}
    return live.client.chat.completions.create(**body)


def json_schema(schema, **more):
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **more}}


def check_many(live, name, requests):
    """Every answer that ends is valid; and nearly all end."""
    ended, texts = 0, set()
    for number in requests:
        form = json_schema(SCHEMAS[name], strict=True)
        answer = ask(live, response_format=form, temperature=1.0, seed=100 * number, n=EACH)
        for choice in answer.choices:
            texts.add(choice.message.content)
            if choice.finish_reason == "stop":
                found = json.loads(choice.message.content)
                jsonschema.validate(found, SCHEMAS[name], format_checker=jsonschema.FormatChecker())
                ended += 1
            else:
                assert choice.finish_reason == "length"
    assert ended >= 0.9 * EACH * len(requests), ended
    assert len(texts) > 5


@pytest.mark.parametrize("name", SCHEMAS)
def test_sampled_answers_are_valid(live, name):
    check_many(live, name, range(6))


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEMAS)
def test_a_thousand_sampled_answers_are_valid(live, name):
    check_many(live, name, range(100, 132))


def test_any_object(live):
    found = 0
    for choice in ask(live, response_format={"type": "json_object"}, seed=0, max_tokens=100, n=EACH).choices:
        if choice.finish_reason == "stop":
            found += isinstance(json.loads(choice.message.content), dict)
    assert found
    empty = ask(live, response_format={"type": "json_schema", "json_schema": {"name": "x"}}, temperature=0)
    assert empty.choices[0].message.content.startswith("{")


def test_a_described_schema_is_taken(live):
    form = json_schema({"enum": ["a", "b"]}, description="One of two letters.")
    assert ask(live, response_format=form, seed=0).choices[0].message.content in ('"a"', '"b"')


def test_a_pydantic_model_as_the_client_parses_it(live):
    class Reply(BaseModel):
        code: Annotated[int, Field(ge=0, le=99999)]
        place: Literal["here", "there"] | None

    answer = live.client.chat.completions.parse(
        model=NAME, messages=user("Where is it?"), response_format=Reply, temperature=0, max_tokens=200,
        extra_body={"structured_outputs": None},
    )  # fmt: skip
    assert isinstance(answer.choices[0].message.parsed, Reply)


def structured(**kinds):
    return {"structured_outputs": kinds}


def test_a_list_of_choices_may_be_as_long_as_its_schema_says(live):
    common = {"seed": 1, "max_tokens": 20}
    choices = [f"c{number}" for number in range(16_384)]
    assert ask(live, extra_body=structured(choice=choices), **common).choices[0].message.content in choices
    nested = ["a", "ab", "abc"]
    found = {
        ask(live, extra_body=structured(choice=nested), seed=seed, temperature=2.0).choices[0].message.content
        for seed in range(12)
    }
    assert len(found) > 1
    assert found <= set(nested)
    with pytest.raises(openai.BadRequestError):
        ask(live, extra_body=structured(choice=[*choices, "one more"]), **common)


def test_regex_choice_grammar_and_json_as_text(live):
    for seed in range(5):
        common = {"seed": seed, "temperature": 1.0}
        text = ask(live, extra_body=structured(regex=r"[a-z]{2,6}/\d{3}(\n| )x?"), **common).choices[0]
        assert re.fullmatch(r"[a-z]{2,6}/\d{3}(\n| )x?", text.message.content)
        assert text.finish_reason == "stop"
        choices = ["yes", "no", " maybe so", 'yes, but\n"not" now', "größer"]
        assert ask(live, extra_body=structured(choice=choices), **common).choices[0].message.content in choices
        lark = 'start: WORD ("," WORD)~1..3\nWORD: /[A-Z][a-z]{0,4}/'
        text = ask(live, extra_body=structured(grammar=lark), **common).choices[0].message.content
        assert re.fullmatch(r"[A-Z][a-z]{0,4}(,[A-Z][a-z]{0,4}){1,3}", text)
        text = (
            ask(live, extra_body=structured(json=json.dumps(SCHEMAS["numbers"])), **common).choices[0].message.content
        )
        jsonschema.validate(json.loads(text), SCHEMAS["numbers"])


def test_completions_too(live):
    answer = live.client.completions.create(
        model=NAME, prompt=["One, two", "Three"], extra_body=structured(regex="[0-9]{3}"), seed=1
    )
    assert all(re.fullmatch("[0-9]{3}", choice.text) for choice in answer.choices)
    with pytest.raises(openai.BadRequestError) as caught:
        live.client.completions.create(model=NAME, prompt="x", extra_body=structured(regex="(("))
    assert caught.value.param == "structured_outputs.regex"


def test_what_is_asked_for_still_comes_from_the_model(live):
    """The likeliest of the choices is the answer, and values are read from the prompt."""
    question = "The access code of the amber archive is 48213.\n\nWhat is the access code of the amber archive?"
    answer = ask(live, messages=user(question), temperature=0, extra_body=structured(regex="[0-9]{5}"))
    assert answer.choices[0].message.content == "48213"
    choices = ["55555", "48213", "10000"]
    answer = ask(live, messages=user(question), temperature=0, extra_body=structured(choice=choices))
    assert answer.choices[0].message.content == "48213"


def test_the_stream_folds_to_the_whole_answer(live):
    body = {"response_format": json_schema(SCHEMAS["person"]), "seed": 3, "logprobs": True, "top_logprobs": 1, "n": 2}
    whole = ask(live, **body)
    chunks = list(ask(live, **body, stream=True))
    for index in range(2):
        choices = [one for chunk in chunks for one in chunk.choices if one.index == index]
        assert "".join(one.delta.content or "" for one in choices) == whole.choices[index].message.content
        logprobs = [item for one in choices if one.logprobs for item in one.logprobs.content]
        assert logprobs == whole.choices[index].logprobs.content
    texts = [json.loads(choice.message.content) for choice in whole.choices]
    assert texts[0] != texts[1]
    for text in texts:
        jsonschema.validate(text, SCHEMAS["person"])
    # the model's own distribution, in which what the form wants may be unlikely
    assert min(item.logprob for item in whole.choices[0].logprobs.content) < -3


def test_length_stop_strings_bias_and_sessions(live):
    form = {"response_format": json_schema(SCHEMAS["person"]), "seed": 5}
    whole = ask(live, **form)
    short = ask(live, **form, max_tokens=4)
    assert short.choices[0].finish_reason == "length"
    assert whole.choices[0].message.content.startswith(short.choices[0].message.content)
    stopped = ask(live, **form, stop=['"age"'])
    assert stopped.choices[0].message.content == whole.choices[0].message.content.partition('"age"')[0]
    assert (stopped.choices[0].finish_reason, stopped.choices[0].stop_reason) == ("stop", '"age"')
    biased = ask(live, extra_body=structured(choice=["5", "7"]), logit_bias={str(_id(live, "7")): 100})
    assert biased.choices[0].message.content == "7"
    one = ask(live, **form, extra_body={"session_id": "form"})
    assert one.choices[0].message.content == whole.choices[0].message.content
    history = [*user("Tell me about the archive."), {"role": "assistant", "content": one.choices[0].message.content}]
    two = ask(live, messages=[*history, *user("And?")], max_tokens=2, extra_body={"session_id": "form"})
    assert two.pacellm["session"] == "resident"
    assert two.usage.prompt_tokens_details.cached_tokens > one.usage.prompt_tokens


def _id(live, text):
    return next(i for i, t in enumerate(live.service.grammars._tokens) if t == text.encode())


SCHEMA = "response_format.json_schema.schema"
PATTERNS = [{"type": "string", "pattern": f".*a{{{number}}}.*"} for number in range(60)]
BAD = {
    "type": ({"response_format": json_schema({"type": "nonsense"})}, SCHEMA),
    "keyword": (
        {"response_format": json_schema({"type": "array", "uniqueItems": True})}, SCHEMA,
    ),
    "reference": ({"response_format": json_schema({"$ref": "http://127.0.0.1:9/x.json"})}, SCHEMA),
    "nothing fits": ({"response_format": json_schema({"enum": []})}, SCHEMA),
    "name": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a b"}}},
        "response_format.json_schema.name",
    ),
    "missing": ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    "too much": ({"response_format": {**json_schema({}), "type": "text"}}, "response_format.json_schema"),
    "regex": ({"structured_outputs": {"regex": "(((("}}, "structured_outputs.regex"),
    "lark": ({"structured_outputs": {"grammar": "start: nothing"}}, "structured_outputs.grammar"),
    "json": ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
    "choice": ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    "several": ({"structured_outputs": {"choice": ["a"], "regex": "a"}}, "structured_outputs"),
    "none": ({"structured_outputs": {}}, "structured_outputs"),
    "other": ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
    "twice": ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
    "eos": ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos"),
    "large": ({"structured_outputs": {"regex": "ab" * 2**17 + "c"}}, "structured_outputs.regex"),
    "many": ({"structured_outputs": {"choice": ["x" * 30] * 16_000}}, "structured_outputs.choice"),
    "counts": ({"structured_outputs": {"regex": "((a{1000}){1000}){1000}"}}, "structured_outputs.regex"),
    "intersection": (
        {"response_format": json_schema({"allOf": PATTERNS})},
        SCHEMA,
    ),
    "guided": ({"guided_json": {}}, "guided_json"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_refused_at_once(live, name):
    changes, param = BAD[name]
    started = time.monotonic()
    with pytest.raises(openai.BadRequestError) as caught:
        ask(live, extra_body=changes)
    assert caught.value.param == param
    assert time.monotonic() - started < 90
    # and what is fine goes on being served
    assert ask(live, extra_body=structured(choice=["fine"])).choices[0].message.content == "fine"


def test_a_keyword_is_refused_by_its_place_in_the_schema(live):
    """Above int64 bounds were clamped to its end."""
    schema = {"type": "object", "properties": {"a": {"type": "integer", "minimum": 10**19, "maximum": 2 * 10**19}}}
    with pytest.raises(openai.BadRequestError, match="schema: #/properties/a/minimum must be 0, or have a size"):
        ask(live, response_format=json_schema(schema))
    with pytest.raises(openai.BadRequestError, match="schema: oneOf cannot be enforced"):
        ask(live, response_format=json_schema({"oneOf": [{"type": "integer"}, {"type": "number"}]}))
    with pytest.raises(openai.BadRequestError, match=r"regex parse error: \^\(a\|b error: unclosed group"):
        ask(live, response_format=json_schema({"type": "string", "pattern": "^(a|b"}))


def test_a_schema_that_is_not_strict_may_have_what_cannot_be_enforced(live):
    schema = {"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True, "maxItems": 3}
    answer = ask(live, response_format=json_schema(schema, strict=False), seed=1)
    assert set(json.loads(answer.choices[0].message.content)) <= {1, 2}


def test_a_grammar_that_fails_later_fails_its_request_alone(live, monkeypatch):
    from pacellm.text.grammar import Matcher

    original = Matcher.allowed

    def explode(self, generated, size):
        if len(generated) == 3 and self._param.endswith("regex"):
            raise RuntimeError("broken on purpose")
        return original(self, generated, size)

    monkeypatch.setattr(Matcher, "allowed", explode)
    with pytest.raises(openai.InternalServerError):
        ask(live, extra_body=structured(regex="[0-9]{9}"))
    assert ask(live, extra_body=structured(choice=["still here"])).choices[0].message.content == "still here"
    live.wait_until_idle()
