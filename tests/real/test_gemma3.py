"""Gemma 3 270M: a base model, without a chat template, whose layers look back over windows of 512 tokens."""

import gc

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pacellm.calibration.file import text as calibration_text
from pacellm.cli.main import serve_options
from pacellm.cli.serve import build
from tests.server.conftest import Live
from tests.server.talk import user

NEW = 8
# at the end of the window, so that the answer crosses it, and far beyond
LENGTHS = (508, 1000)


@pytest.fixture(scope="module")
def expected(gemma3):
    """(prompt, text that greedy `generate` adds) by length in tokens."""
    tokenizer = AutoTokenizer.from_pretrained(gemma3)
    model = AutoModelForCausalLM.from_pretrained(gemma3).eval()
    ids, found = tokenizer(calibration_text())["input_ids"], {}
    for length in LENGTHS:
        prompt = torch.tensor([ids[:length]])
        with torch.inference_mode():
            whole = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, do_sample=False)
        found[length] = (ids[:length], tokenizer.decode(whole[0, length:], skip_special_tokens=True))
    del model
    gc.collect()  # 1 GB, before the server loads its own
    return found


@pytest.fixture(scope="module")
def live(gemma3, expected):
    service, keys, _ = build(serve_options([str(gemma3), "--device", "cpu", "--max-model-len", "8K"]))
    with Live(service, keys) as server:
        server.http.timeout = 300
        yield server


@pytest.mark.parametrize("length", LENGTHS)
def test_greedy_tokens_are_those_of_generate(length, live, expected):
    ids, text = expected[length]
    answer = live.http.post("/v1/completions", json={"prompt": ids, "temperature": 0, "max_tokens": NEW}).json()
    assert answer["choices"][0]["text"] == text
    assert answer["usage"]["completion_tokens"] == NEW


def test_a_session_crosses_the_window_turn_by_turn(live, expected):
    """What was read in parts, with the window's beginning given up on the way, is what is read at once."""
    ids, text = expected[LENGTHS[-1]]
    for end in (400, 600, 990, LENGTHS[-1]):
        body = {"prompt": ids[:end], "temperature": 0, "max_tokens": 0 if end < LENGTHS[-1] else NEW, "session_id": "s"}
        answer = live.http.post("/v1/completions", json=body).json()
    assert answer["choices"][0]["text"] == text
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 990


def test_texts_begin_with_its_begin_token(live):
    assert live.http.post("/tokenize", json={"prompt": "Hello"}).json()["tokens"][0] == 2


def test_chat_needs_a_template(live):
    response = live.http.post("/v1/chat/completions", json={"messages": user("Hello")})
    assert response.status_code == 400
    assert "--chat-template" in response.json()["error"]["message"]
