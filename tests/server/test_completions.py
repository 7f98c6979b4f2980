"""Text completions through the real client: strings, lists, ids, echo with log-probabilities."""

import math

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from pacellm.config import EngineConfig
from pacellm.demo import MODEL_PATH
from tests.server.conftest import NAME, start

TEXTS = ["The access code of the amber archive is", "The river"]


def complete(live, **changes):
    usual = {"model": NAME, "prompt": TEXTS[0], "max_tokens": 4, "temperature": 0}
    return live.client.completions.create(**{**usual, **changes})


def ids_of(live, text):
    return live.http.post("/tokenize", json={"prompt": text}).json()["tokens"]


def test_strings_lists_and_ids_say_the_same(live):
    one = [complete(live, prompt=text).choices[0].text for text in TEXTS]
    both = complete(live, prompt=TEXTS)
    assert [choice.text for choice in both.choices] == one
    assert [choice.index for choice in both.choices] == [0, 1]
    ids = [ids_of(live, text) for text in TEXTS]
    assert [choice.text for choice in complete(live, prompt=ids).choices] == one
    assert complete(live, prompt=ids[0]).choices[0].text == one[0]
    assert both.usage.prompt_tokens == sum(map(len, ids))
    assert both.usage.completion_tokens == sum(complete(live, prompt=t).usage.completion_tokens for t in TEXTS)


def test_the_stream_folds_to_the_whole_answer(live):
    whole = complete(live, prompt=TEXTS, logprobs=2, echo=True)
    options = {"include_usage": True}
    chunks = list(complete(live, prompt=TEXTS, logprobs=2, echo=True, stream=True, stream_options=options))
    assert chunks[-1].usage == whole.usage
    for index, choice in enumerate(whole.choices):
        parts = [part for chunk in chunks for part in chunk.choices if part.index == index]
        assert "".join(part.text for part in parts) == choice.text
        assert [token for part in parts if part.logprobs for token in part.logprobs.tokens] == choice.logprobs.tokens
        assert parts[-1].finish_reason == choice.finish_reason == "length"


def test_echo_scores_the_prompt_as_one_forward_pass_does(live):
    ids = ids_of(live, "The access code of the amber archive is 48213. " * 3)
    off = {"pacellm": {"pa": "off"}}
    choice = complete(live, prompt=ids, echo=True, logprobs=1, max_tokens=0, extra_body=off).choices[0]
    scores = choice.logprobs.token_logprobs
    assert (len(scores), scores[0]) == (len(ids), None)
    plain = AutoModelForCausalLM.from_pretrained(MODEL_PATH).eval()
    with torch.no_grad():
        logprobs = plain(torch.tensor([ids])).logits[0].log_softmax(-1)
    for place in range(1, len(ids)):
        assert scores[place] == pytest.approx(float(logprobs[place - 1, ids[place]]), abs=1e-4)
        named = choice.logprobs.top_logprobs[place]
        assert max(named.values()) == pytest.approx(float(logprobs[place - 1].max()), abs=1e-4)
        assert scores[place] in named.values()
        assert 1 <= len(named) <= 2


def test_scores_do_not_depend_on_chunks_or_company(live):
    ids = ids_of(live, "the river and the hills " * 300)

    def scores(server, prompts):
        answer = complete(server, prompt=prompts, echo=True, logprobs=0, max_tokens=1)
        return [choice.logprobs.token_logprobs for choice in answer.choices]

    (alone,) = scores(live, [ids])
    assert all(value is None or (value <= 0 and math.isfinite(value)) for value in alone)
    with start(EngineConfig(kv_cache_memory=2**28, max_num_batched_tokens=100, max_num_mixed_tokens=50)) as other:
        assert scores(other, [ids, ids[5:], ids[:40]])[0] == alone


def test_echo_and_answer_are_one_text(live):
    """What was sent, and the tokens, and the offsets."""
    choice = complete(live, prompt=TEXTS[0], echo=True, logprobs=0, max_tokens=6).choices[0]
    alone = complete(live, prompt=TEXTS[0], max_tokens=6).choices[0]
    assert choice.text == TEXTS[0] + alone.text
    assert alone.text.startswith(" ")
    assert "".join(choice.logprobs.tokens) == choice.text
    for token, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
        assert choice.text[offset:].startswith(token)
    assert choice.logprobs.top_logprobs[0] is None
    for token, value, top in zip(*(column[1:] for column in (
        choice.logprobs.tokens, choice.logprobs.token_logprobs, choice.logprobs.top_logprobs,
    )), strict=True):  # fmt: skip
        assert top == {token: value}


def test_the_chosen_token_is_among_the_alternatives(live):
    choice = complete(live, prompt=TEXTS[0], logprobs=20, max_tokens=5, temperature=2.0, seed=5).choices[0]
    rows = zip(choice.logprobs.tokens, choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True)
    for token, value, top in rows:
        assert 20 <= len(top) <= 21
        assert top[token] == value


def test_several_choices(live):
    usual = {"prompt": TEXTS, "n": 2, "temperature": 1.5, "seed": 3, "max_tokens": 6, "echo": True, "logprobs": 1}
    whole = complete(live, **usual)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    alone = [complete(live, **usual | {"prompt": text, "seed": seed, "n": 1}) for text in TEXTS for seed in (3, 4)]
    assert [choice.text for choice in whole.choices] == [one.choices[0].text for one in alone]
    assert [choice.logprobs for choice in whole.choices] == [one.choices[0].logprobs for one in alone]
    assert {choice.finish_reason for choice in whole.choices} <= {"length", "stop"}
    chunks = list(complete(live, **usual, stream=True, stream_options={"include_usage": True}))
    for choice in whole.choices:
        parts = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert "".join(part.text for part in parts) == choice.text
        assert parts[-1].finish_reason == choice.finish_reason
    assert chunks[-1].usage == whole.usage
    assert all(chunk.choices for chunk in chunks[:-1])  # clients look at the first choice of every chunk
    assert whole.usage.prompt_tokens == sum(one.usage.prompt_tokens for one in alone[::2])


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt.0"),
        ({"prompt": [99999]}, "prompt"),
        ({"prompt": [-1]}, "prompt.0"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"n": 0}, "n"),
        ({"best_of": 3}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"prompt": TEXTS, "extra_body": {"session_id": "s"}}, "prompt"),
        ({"echo": True, "logprobs": 1, "extra_body": {"session_id": "s"}}, "echo"),
    ],
)
def test_refused_with_the_field_named(live, changes, param):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(live, **changes)
    assert caught.value.param == param
    live.wait_until_idle()


def test_tokenize_and_back(live):
    answer = live.http.post("/tokenize", json={"prompt": TEXTS[0], "return_token_strs": True}).json()
    assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), 262144)
    assert len(answer["token_strs"]) == answer["count"]
    assert live.http.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": TEXTS[0]}
    messages = [{"role": "user", "content": "hi"}]
    chat = live.http.post("/tokenize", json={"messages": messages}).json()
    usage = live.client.chat.completions.create(model=NAME, messages=messages, max_tokens=1).usage
    assert chat["count"] == usage.prompt_tokens
    for path, body in (("/tokenize", {}), ("/detokenize", {"tokens": [99999]}), ("/detokenize", {"tokens": "x"})):
        assert live.http.post(path, json=body).status_code == 400
    assert live.http.post("/tokenize", json={"prompt": "x", "model": "gpt-9"}).status_code == 404


def test_progress_of_each_prompt(live):
    texts = ["the river and the hills " * 400, "hi"]
    extra = {"return_progress": True}
    chunks = list(complete(live, prompt=texts, stream=True, max_tokens=1, extra_body=extra))
    shown = [chunk.model_extra["prompt_progress"] for chunk in chunks if "prompt_progress" in (chunk.model_extra or {})]
    assert {one["index"] for one in shown} == {0, 1}
    assert all(one["processed"] <= one["total"] for one in shown)


def test_an_answer_says_what_became_of_the_session(live):
    body = {"model": NAME, "prompt": TEXTS[0], "max_tokens": 2, "temperature": 0, "session_id": "told"}
    for wanted in ("new", "resident"):
        answer = live.http.post("/v1/completions", json=body)
        assert answer.headers["X-PaceLLM-Session"] == answer.json()["pacellm"]["session"] == wanted
    assert answer.json()["pacellm"]["cached_tokens"] == answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    several = live.http.post("/v1/completions", json={"model": NAME, "prompt": TEXTS, "max_tokens": 2}).json()
    assert "pacellm" not in several
    assert [choice["pacellm"]["session"] for choice in several["choices"]] == ["none", "none"]
