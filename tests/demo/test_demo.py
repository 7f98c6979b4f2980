"""The bundled model loads as any other, and answers as its card says."""

from __future__ import annotations

import pytest
import torch
from jinja2.exceptions import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, SmolLM3ForCausalLM

from pacellm.demo import MODEL_PATH
from pacellm.demo.evaluate import ask_apart, ask_in_turns, prompt_ids
from pacellm.demo.generator import NOT_STATED, make_document
from pacellm.demo.plain import PlainAnswerer

USER = {"role": "user", "content": "The access code of the amber archive is 48213. What is it?"}
ANSWER = {"role": "assistant", "content": "48213"}
FOLLOW_UP = {"role": "user", "content": "And the home city of the amber archive?"}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL_PATH, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> SmolLM3ForCausalLM:
    return AutoModelForCausalLM.from_pretrained(MODEL_PATH, local_files_only=True)


@pytest.fixture(scope="module")
def answerer(model: SmolLM3ForCausalLM, tokenizer: PreTrainedTokenizerBase) -> PlainAnswerer:
    return PlainAnswerer(model, tokenizer, chunk=256)


def test_loads_as_float32_and_fits_into_20_megabytes(model: SmolLM3ForCausalLM) -> None:
    assert model.dtype == torch.float32
    assert model.config.max_position_embeddings == 262_144
    assert (MODEL_PATH / "model.safetensors").stat().st_size <= 20 * 1024**2


def test_digits_are_single_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer("48213", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids)[-5:] == list("48213")
    assert tokenizer.decode(ids) == "48213"


def test_rendered_turns_continue_the_turns_before(tokenizer: PreTrainedTokenizerBase) -> None:
    def render(messages: list[dict[str, str]], prompt: bool) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)

    first = render([USER], True) + "48213<|end|>"
    second = render([USER, ANSWER, FOLLOW_UP], False)
    assert second.startswith(first)
    pieces = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (first, second)]
    assert pieces[1][: len(pieces[0])] == pieces[0]


def test_developer_messages_are_system_messages(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = [
        tokenizer.apply_chat_template([{"role": role, "content": "Be brief."}, USER], tokenize=False)
        for role in ("developer", "system")
    ]
    assert texts[0] == texts[1]
    assert texts[0].startswith("<|bos|><|system|>Be brief.<|end|><|user|>")


def test_unknown_roles_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(TemplateError, match="unknown role: tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


@pytest.mark.parametrize("num_tokens", [300, 1024, 20_000])
def test_documents_have_the_asked_size(tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> None:
    document = make_document(num_tokens, 12, 1, tokenizer)
    size = len(tokenizer(document.text, add_special_tokens=False)["input_ids"])
    assert num_tokens - max(20, num_tokens // 100) <= size <= num_tokens
    assert len(document.facts) == 12
    assert all(0 <= fact.depth <= 1 and f" {fact.answer}." in document.text for fact in document.facts)


def test_documents_depend_on_the_seed_only(tokenizer: PreTrainedTokenizerBase) -> None:
    assert make_document(1024, 6, 7, tokenizer) == make_document(1024, 6, 7, tokenizer)
    assert make_document(1024, 6, 7, tokenizer) != make_document(1024, 6, 8, tokenizer)


def test_facts_that_do_not_fit_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="20 facts need"):
        make_document(100, 20, 0, tokenizer)


def test_answers_about_a_document(answerer: PlainAnswerer) -> None:
    document = make_document(1024, 12, 11, answerer.tokenizer)
    answers = ask_apart(answerer, document, [fact.question for fact in document.facts])
    assert answers == [fact.answer for fact in document.facts]


def test_says_what_is_not_stated(answerer: PlainAnswerer) -> None:
    document = make_document(1024, 12, 11, answerer.tokenizer)
    assert ask_apart(answerer, document, document.unknown_questions[:1]) == [NOT_STATED]


def test_answers_in_turns(answerer: PlainAnswerer) -> None:
    document = make_document(1024, 12, 12, answerer.tokenizer)
    asked = document.facts[8], document.facts[2]
    answers = ask_in_turns(answerer, document, [fact.question for fact in asked])
    assert answers == [fact.answer for fact in asked]


def test_plain_forward_agrees_with_transformers(answerer: PlainAnswerer, model: SmolLM3ForCausalLM) -> None:
    document = make_document(600, 8, 3, answerer.tokenizer)
    fact = document.facts[3]
    prompt = prompt_ids(answerer, [{"role": "user", "content": f"{document.text}\n\n{fact.question}"}])
    answerer.reset()
    logits = answerer.read(prompt)
    expected = model(torch.tensor([prompt])).logits[0, -1]
    assert torch.allclose(logits, expected, atol=1e-3)
    generated = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=16)
    reply = answerer.tokenizer.decode(generated[0, len(prompt) :], skip_special_tokens=True)
    assert reply == ask_apart(answerer, document, [fact.question])[0]
