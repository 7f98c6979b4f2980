"""Chat completions through the real client."""

import dataclasses
import functools
import re
from unittest.mock import ANY

import openai
import pytest

import pacellm
from pacellm.demo import MODEL_PATH
from pacellm.demo.generator import make_document
from pacellm.engine.fingerprint import system_fingerprint
from pacellm.text.tokenizer import ChatTokenizer
from tests.server.conftest import NAME


def user(text):
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def document():
    return make_document(num_tokens=1200, num_facts=6, seed=3, tokenizer=ChatTokenizer(MODEL_PATH)._tokenizer)


def test_a_question_about_a_document_and_a_second_turn(live, document):
    first, second = document.facts[1], document.facts[4]
    history = user(f"{document.text}\n\n{first.question}")
    one = live.client.chat.completions.create(
        model=NAME, messages=history, temperature=0, extra_body={"session_id": "doc"}
    )
    assert first.answer in one.choices[0].message.content
    assert one.choices[0].finish_reason == "stop"
    assert one.usage.prompt_tokens_details.cached_tokens == 0
    assert one.usage.total_tokens == one.usage.prompt_tokens + one.usage.completion_tokens
    assert one.pacellm["session"] == "new"
    assert sum(one.pacellm["bank"][name] for name in ("hits", "fuses", "misses", "empty")) > 1200
    history += [{"role": "assistant", "content": one.choices[0].message.content}, *user(second.question)]
    two = live.client.chat.completions.create(
        model=NAME, messages=history, temperature=0, extra_headers={"X-Session-ID": "doc"}
    )
    assert second.answer in two.choices[0].message.content
    assert two.pacellm["session"] == "resident"
    # all but the end of the first answer and the second question was in place
    assert two.usage.prompt_tokens - two.usage.prompt_tokens_details.cached_tokens < 40
    assert two.usage.prompt_tokens_details.cached_tokens >= one.usage.prompt_tokens


def test_the_stream_folds_to_the_whole_answer(live, document):
    body = {"model": NAME, "messages": user(f"{document.text}\n\n{document.facts[0].question}"), "temperature": 0}
    for _ in range(2):  # both below find the same prefix kept, whatever other tests have left behind
        live.client.chat.completions.create(**body)
    whole = live.client.chat.completions.create(**body, logprobs=True, top_logprobs=2)
    chunks = list(
        live.client.chat.completions.create(
            **body, logprobs=True, top_logprobs=2, stream=True, stream_options={"include_usage": True},
            extra_body={"return_progress": True},
        )
    )  # fmt: skip
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(choice.delta.content or "" for choice in choices) == whole.choices[0].message.content
    assert choices[0].delta.role == "assistant"
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["stop"]
    assert chunks[-1].usage == whole.usage
    assert not any(chunk.usage for chunk in chunks[:-1])
    logprobs = [item for choice in choices if choice.logprobs for item in choice.logprobs.content]
    assert logprobs == whole.choices[0].logprobs.content
    assert len(logprobs) == whole.usage.completion_tokens
    assert all(item.logprob <= 0 and len(item.top_logprobs) == 2 for item in logprobs)
    progress = [chunk.prompt_progress for chunk in chunks if hasattr(chunk, "prompt_progress")]
    assert progress[-1]["processed"] == progress[-1]["total"] == whole.usage.prompt_tokens


def test_without_include_usage_the_stream_has_none(live):
    chunks = list(live.client.chat.completions.create(model=NAME, messages=user("hello"), max_tokens=3, stream=True))
    assert not any(chunk.usage for chunk in chunks)
    assert chunks[-1].pacellm["session"] == "none"


def test_same_seed_same_text(live):
    def text(seed):
        answer = live.client.chat.completions.create(
            model=NAME, messages=user("Tell me a story."), seed=seed, temperature=1.5, max_tokens=20,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        return answer.choices[0].message.content

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_stop_and_length(live, document):
    messages = user(f"{document.text}\n\n{document.facts[0].question}")
    whole = live.client.chat.completions.create(model=NAME, messages=messages, temperature=0)
    text = whole.choices[0].message.content
    stopped = live.client.chat.completions.create(model=NAME, messages=messages, temperature=0, stop=[text[2:4]])
    assert stopped.choices[0].message.content == text[:2]
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].stop_reason == text[2:4]
    short = live.client.chat.completions.create(model=NAME, messages=messages, temperature=0, max_tokens=1)
    assert short.choices[0].finish_reason == "length"
    assert short.usage.completion_tokens == 1
    warm = live.client.chat.completions.create(model=NAME, messages=messages, max_tokens=0)
    assert warm.choices[0].message.content == ""
    assert warm.usage.completion_tokens == 0


def test_content_parts_system_and_developer(live):
    for role in ("system", "developer"):
        messages = [
            {"role": role, "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        ]
        answer = live.client.chat.completions.create(model=NAME, messages=messages, max_tokens=2)
        assert answer.usage.completion_tokens >= 1


def test_models(live):
    (model,) = live.client.models.list().data
    assert (model.id, model.max_model_len, model.context_length) == (NAME, 262144, 262144)
    assert live.client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError) as caught:
        live.client.models.retrieve("gpt-9")
    assert caught.value.code == "model_not_found"


def test_health_ready_version_metrics(live):
    assert live.http.get("/health").json()["status"] == "ok"
    assert live.http.get("/ready").status_code == 200
    version = live.http.get("/version").json()
    assert version.pop("products") == {"kernel": ANY, "rows": ANY, "exact": True}
    assert version == {"version": pacellm.__version__, "attention_kernel": "cpu", "pa": "observe"}
    live.client.chat.completions.create(model=NAME, messages=user("hello"), max_tokens=2)
    text = live.http.get("/metrics").text
    for name in (
        "pacellm_num_requests_running",
        "pacellm_kv_cache_usage_perc",
        "pacellm_time_to_first_token_seconds_bucket",
        'pacellm_bank_reads_total{layer="1",model_name="pacellm-demo",outcome="hit",preset="observe"}',
        'pacellm_requests_by_pa_total{model_name="pacellm-demo",pa="observe"}',
        "pacellm_bank_effective_rank_bucket",
        "process_resident_memory_bytes",
        "pacellm_sessions_resident",
    ):
        assert name in text, name


def test_off_and_read_only_and_commit_false(live):
    off = live.client.chat.completions.create(
        model=NAME, messages=user("hello"), max_tokens=2, extra_body={"pacellm": {"pa": "off"}}
    )
    assert off.pacellm["bank"] is None
    assert off.pacellm["pa"] == "off"
    read = live.client.chat.completions.create(
        model=NAME, messages=user("hello"), max_tokens=2,
        extra_body={"session_id": "peek", "pacellm": {"pa": "read_only", "commit": False}},
    )  # fmt: skip
    assert read.pacellm["bank"]["replacements"] == 0
    assert read.pacellm["pa"] == "observe_read_only"
    assert live.engine.sessions.get(("default", "peek")) is None


def test_presets_by_request_in_one_session(live, document):
    """Observed by default, which changes nothing; presets that act are asked for by name, in any session."""
    question = user(f"{document.text}\n\n{document.facts[0].question}")

    def ask(session, pa=None):
        body = {"session_id": session, **({} if pa is None else {"pacellm": {"pa": pa}})}
        answer = live.client.chat.completions.create(
            model=NAME, messages=question, temperature=0, logprobs=True, max_tokens=8, extra_body=body
        )
        return answer.pacellm, [token.logprob for token in answer.choices[0].logprobs.content]

    default, plain = ask("observed"), ask("plain", "off")
    assert default[0]["pa"] == "observe"
    assert default[0]["bank"]["replacements"]
    assert default[1] == plain[1]
    assert ask("paper", "paper")[1] != plain[1]
    for pa, done in (("reference", "reference"), ("on", "observe"), ("paper_read_only", "paper_read_only")):
        assert ask("observed", pa)[0]["pa"] == done
    session = live.engine.sessions.get(("default", "observed"))
    assert [turn.pa for turn in session.log] == ["observe", "reference", "observe", "paper_read_only"]


def test_tokens_put_together_are_the_content(live):
    """As texts and as bytes; the token that ends an answer is no part of it."""
    for text in ("What is the access code? The code is 48213.", "Say 🦜 and é."):
        answer = live.client.chat.completions.create(
            model=NAME, messages=[{"role": "user", "content": text}], temperature=1.5, seed=1, logprobs=True,
            top_logprobs=5, max_tokens=20,
        )  # fmt: skip
        choice = answer.choices[0]
        content = choice.logprobs.content
        assert "".join(item.token for item in content) == choice.message.content
        assert bytes(byte for item in content for byte in item.bytes).decode(errors="replace") == choice.message.content
        assert len(content) == answer.usage.completion_tokens


def test_what_clients_note_on_an_answer_is_no_part_of_the_prompt(live):
    """Unknown fields of an assistant's message, refusals, indices and parsed arguments of its calls."""
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    noted = call | {"index": 0, "function": call["function"] | {"parsed_arguments": {"city": "Oslo"}}}
    tool = {"role": "tool", "tool_call_id": "call_1", "content": "sun"}

    def tokens(*messages):
        body = {"messages": [{"role": "user", "content": "hello"}, *messages]}
        answer = live.http.post("/tokenize", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["tokens"]

    said = {"role": "assistant", "content": "hi"}
    notes = {"parsed": {"a": 1}, "annotations": [{"type": "url_citation"}], "reasoning_details": [], "index": 0}
    question = {"role": "user", "content": "and?"}
    assert tokens(said | notes, question) == tokens(said, question)
    refused = {"role": "assistant", "content": None, "refusal": "I will not."}
    assert tokens(refused, question) == tokens({"role": "assistant", "content": "I will not."}, question)
    bare = {"role": "assistant", "content": None}
    assert tokens(bare | {"tool_calls": [noted]}, tool) == tokens(bare | {"tool_calls": [call]}, tool)
    unknown = live.http.post("/tokenize", json={"messages": [question | {"parsed": 1}]})
    assert unknown.status_code == 400


def test_no_chunk_of_several_choices_is_without_a_choice(live):
    """openai-node reads `choices[0].delta` of every chunk that it did not ask for as usage."""
    body = {"model": NAME, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "n": 3, "stream": True}
    chunks = list(live.client.chat.completions.create(**body, seed=1))
    assert all(len(chunk.choices) == 1 for chunk in chunks)
    assert [bool(chunk.model_dump().get("pacellm")) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert sorted(chunk.choices[0].index for chunk in chunks if chunk.choices[0].finish_reason) == [0, 1, 2]


def test_the_system_fingerprint_is_that_of_what_answers_depend_on(live):
    asked = {"model": NAME, "max_tokens": 2}
    whole = live.client.chat.completions.create(**asked, messages=user("Hello"))
    chunks = list(live.client.chat.completions.create(**asked, messages=user("Hello"), stream=True))
    completion = live.client.completions.create(**asked, prompt="Hello")
    (found,) = {one.system_fingerprint for one in (whole, *chunks, completion)}
    engine = live.service.engine
    told = functools.partial(system_fingerprint, engine.model)
    assert found == told(engine.config, pacellm.__version__)
    assert re.fullmatch("fp_[0-9a-f]{10}", found)
    assert (
        told(dataclasses.replace(engine.config, session_dir="/elsewhere", max_num_seqs=3), pacellm.__version__) == found
    )
    assert told(dataclasses.replace(engine.config, ce_density=0.75), pacellm.__version__) != found
    assert told(engine.config, "another") != found
