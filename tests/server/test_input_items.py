"""GET /v1/responses/{id}/input_items, by openai-python."""

import openai
import pytest

from pacellm.server.api.responses.item_list import input_items, page
from pacellm.server.response_store import Transcript
from tests.server.conftest import NAME

FEW = {"model": NAME, "max_output_tokens": 4, "temperature": 0}
SAID = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": [{"type": "input_text", "text": "One, "}, {"type": "input_text", "text": "two?"}]},
    {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": '{"a": 1}'},
    {"type": "function_call_output", "call_id": "call_1", "output": "three"},
]


@pytest.fixture
def strict(clean):
    with openai.OpenAI(
        base_url=f"{clean.url}/v1", api_key="x", max_retries=0, _strict_response_validation=True
    ) as made:
        yield made.responses


def shown(item):
    kind = item.type if item.type != "message" else item.role
    text = item.content[0].text if item.type == "message" else getattr(item, "arguments", None) or item.output
    return kind, text


def listed(responses, response, **options):
    return list(responses.input_items.list(response.id, **{"order": "asc", **options}))


def test_a_text(strict):
    made = strict.create(**FEW, input="Hello", instructions="Be kind.")
    (item,) = listed(strict, made)
    assert shown(item) == ("user", "Hello")
    assert item.id.startswith("msg_")
    assert strict.input_items.list(made.id).data == [item]


@pytest.mark.parametrize("limit", [1, 2, 3, 100])
def test_items_in_pages_in_both_orders(strict, limit):
    made = strict.create(**FEW, input=SAID)
    expected = [("developer", "Be brief."), ("user", "One, two?"), ("function_call", '{"a": 1}'),
                ("function_call_output", "three")]  # fmt: skip
    items = listed(strict, made, limit=limit)
    assert [shown(item) for item in items] == expected
    assert listed(strict, made, limit=limit, order="desc") == items[::-1]
    first = strict.input_items.list(made.id, limit=limit)  # the last ones first
    assert first.data == items[::-1][:limit]
    assert (first.has_more, first.first_id, first.last_id) == (limit < 4, first.data[0].id, first.data[-1].id)
    assert len({item.id for item in items}) == 4
    assert items[2].call_id == items[3].call_id == "call_1"
    behind = strict.input_items.list(made.id, order="asc", after=items[-1].id)
    assert (behind.data, behind.has_more) == ([], False)


@pytest.mark.parametrize("by", ["previous_response_id", "conversation"])
def test_what_was_said_before_is_there_too(strict, by):
    conversation = {"conversation": "listed"} if by == "conversation" else {}
    first = strict.create(**FEW, input="One?", **conversation)
    behind = conversation or {"previous_response_id": first.id}
    second = strict.create(**FEW, input="Two?", **behind)
    (asked,) = listed(strict, first)
    again, answer, new = listed(strict, second)
    assert again == asked
    assert answer.id == first.output[0].id
    assert (answer.role, answer.content[0].text) == ("assistant", first.output_text)
    assert shown(new) == ("user", "Two?")
    assert new.id != asked.id


def test_what_is_refused(strict, clean):
    made = strict.create(**FEW, input="Hello")
    for query, name in (("limit=0", "limit"), ("limit=101", "limit"), ("order=up", "order"), ("after=msg_x", "after"),
                        ("before=x", "before"), ("include[]=x", "include[].0")):  # fmt: skip
        answer = clean.http.get(f"/v1/responses/{made.id}/input_items?{query}")
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, name), query
    strict.input_items.list(made.id, include=["reasoning.encrypted_content"])
    assert strict.retrieve(made.id, include=["reasoning.encrypted_content"]).id == made.id
    for name in ("resp_none", "listed"):
        with pytest.raises(openai.NotFoundError):
            strict.input_items.list(name)
    unkept = strict.create(**FEW, input="Hello", store=False)
    with pytest.raises(openai.NotFoundError):
        strict.input_items.list(unkept.id)
    strict.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        strict.input_items.list(made.id)


def test_an_answer_of_several_items_has_their_ids():
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    answer = {"role": "assistant", "content": "Well.", "reasoning_content": "Hm.", "tool_calls": [call]}
    first = Transcript(({"role": "user", "content": "x"}, answer), None, "s", ("rs_1", "msg_1", "fc_1"))
    result = {"role": "tool", "content": "1", "tool_call_id": "call_1"}
    last = Transcript((result, {"role": "assistant", "content": ""}), first, "s", ("msg_2",))
    assert [item["id"] for item in input_items(last)][1:4] == ["rs_1", "msg_1", "fc_1"]
    assert [item["type"] for item in input_items(last)] == [
        "message", "reasoning", "message", "function_call", "function_call_output",
    ]  # fmt: skip
    assert page(input_items(last), limit=2, after="rs_1", order="asc")["last_id"] == "fc_1"


def test_equal_items_have_ids_of_their_own():
    said = tuple({"role": "user", "content": "x"} for _ in range(3))
    node = Transcript((*said, {"role": "assistant", "content": ""}), None, "s")
    assert len({item["id"] for item in input_items(node)}) == 3
    assert input_items(node) == input_items(node)
