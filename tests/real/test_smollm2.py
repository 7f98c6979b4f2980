"""SmolLM2-135M-Instruct as a user gets it: `pacellm serve` on its directory with no other flag, and transformers beside
it."""

import concurrent.futures
import json
import re

import jsonschema
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pacellm.calibration.file import text as calibration_text
from pacellm.cli.main import serve_options
from pacellm.cli.serve import build
from pacellm.demo import real
from pacellm.errors import PaceError
from pacellm.gguf.check import check_gguf
from pacellm.model.load import load
from pacellm.real_models import gguf_file
from pacellm.text.tokenizer import ChatTokenizer
from tests.server.conftest import Live
from tests.server.talk import WEATHER, user

NEW = 12
PROSE = calibration_text()
PROMPTS = {
    "short": user("What is the capital of France?"),
    "list": user("Name three animals that live in the sea."),
    "system": [{"role": "system", "content": "You answer in one word."}, *user("Which colour is the sky?")],
    "turns": [
        *user("My name is Hedwig."),
        {"role": "assistant", "content": "Nice to meet you, Hedwig!"},
        *user("What is my name?"),
    ],
    "emoji": user("What do 🙂, 🚀 and 👩‍👩‍👧 stand for? And “naïve café”, 你好?"),
    "code": user("Write a Python function that adds  2  numbers:\n\n```python\n    def add(a, b):\n"),
    "600 tokens": user(f"{PROSE[:2600]}\n\nWho is this about?"),
    "1.9K tokens": user(f"{PROSE[2600:10400]}\n\nSum this up in one sentence."),
    "3.9K tokens": user(f"{PROSE}\n\nWhat is the first story about?"),
}
LENGTHS = {"600 tokens": (500, 800), "1.9K tokens": (1800, 2000), "3.9K tokens": (3800, 4000)}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def serve(path, *flags):
    """A live server, made as the command line makes it; on a CPU also where there is a GPU, whose type is bfloat16."""
    service, keys, _ = build(serve_options([str(path), "--device", "cpu", *flags]))
    return Live(service, keys)


@pytest.fixture(scope="module")
def live(smollm2):
    with serve(smollm2) as server:
        server.http.timeout = 300
        yield server


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def plain(smollm2):
    """transformers' own model."""
    return AutoModelForCausalLM.from_pretrained(smollm2).eval()


def chat(server, messages, **changes):
    body = {"messages": messages, "temperature": 0, "max_tokens": NEW, **changes}
    response = server.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def said(answer, index=0):
    return answer["choices"][index]["message"]["content"]


@pytest.mark.parametrize("name", PROMPTS)
def test_greedy_tokens_are_those_of_generate(name, live, plain, tokenizer):
    messages = PROMPTS[name]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    low, high = LENGTHS.get(name, (1, 200))
    assert low <= ids.shape[1] <= high
    rendered = live.http.post("/tokenize", json={"messages": messages}).json()
    assert rendered["tokens"] == ids[0].tolist()
    with torch.inference_mode():
        whole = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
    expected = [token for token in whole[0, ids.shape[1] :].tolist() if token not in live.engine.model.eos_token_ids]
    answer = chat(live, messages, logprobs=True)
    shown = answer["choices"][0]["logprobs"]["content"]
    assert len(shown) in (len(expected), len(expected) + 1)  # with the token that ended it
    assert said(answer) == tokenizer.decode(expected) == "".join(entry["token"] for entry in shown)


def test_it_knows_the_capital_of_france(live):
    assert said(chat(live, PROMPTS["short"])) == "The capital of France is Paris."


def test_logprobs_are_those_without_pa_to_the_bit(live, smollm2, tokenizer):
    """Longer than a segment, so that banks are written and read; of every token of the prompt, and of the answer's."""
    ids = tokenizer(PROSE)["input_ids"][:1100]
    body = {"prompt": ids, "max_tokens": 8, "temperature": 0, "logprobs": 5, "echo": True}
    observed = live.http.post("/v1/completions", json=body).json()
    with serve(smollm2, "--no-pa") as server:
        server.http.timeout = 300
        without = server.http.post("/v1/completions", json=body).json()
    assert observed["choices"][0]["logprobs"] == without["choices"][0]["logprobs"]
    assert len(observed["choices"][0]["logprobs"]["tokens"]) == 1108
    assert without["pacellm"]["bank"] is None
    assert observed["pacellm"]["bank"]["filled"] > 0


def test_what_a_document_says_is_found(live):
    """Ten questions at once, each in a fork of the session that read the document; one also without a session."""
    document = real.real_document(share=0.3)
    history = real.reading(document)
    read = chat(live, history, session_id="document", max_tokens=0, add_generation_prompt=False)
    assert 1024 < read["usage"]["prompt_tokens"] < 1600  # more than a segment

    def ask(fact):
        name = re.sub(r"\W", "", fact.question)
        assert live.http.post("/v1/sessions/document/fork", json={"session_id": name}).status_code == 201
        answer = chat(live, [*history, *user(fact.question)], session_id=name, max_tokens=20)
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == read["usage"]["prompt_tokens"]
        return said(answer)

    with concurrent.futures.ThreadPoolExecutor(len(document.facts)) as threads:
        answers = list(threads.map(ask, document.facts))
    right = [fact.answer in answer for fact, answer in zip(document.facts, answers, strict=True)]
    assert sum(right) >= 9, answers
    alone = chat(live, [*history, *user(document.facts[3].question)], max_tokens=20)
    assert said(alone) == answers[3]


def test_a_json_schema(live):
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    messages = user("Write the name and the age of Anna, who is 31 years old, as JSON.")
    person = json.loads(said(chat(live, messages, response_format=form, max_tokens=60)))
    jsonschema.validate(person, PERSON)
    assert person == {"name": "Anna", "age": 31}


def test_a_tool_call(live):
    answer = chat(live, user("What is the weather in Paris, in Celsius?"), tools=[WEATHER], tool_choice="required",
                  parallel_tool_calls=False, max_tokens=80)  # fmt: skip
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    arguments = json.loads(call["function"]["arguments"])
    jsonschema.validate(arguments, WEATHER["function"]["parameters"])
    assert (call["function"]["name"], arguments["place"]) == ("get_weather", "Paris")


def test_an_agents_loop_with_tools_and_no_choice(live):
    """Its template has no tools: the server writes them into the system message, and the model calls or answers."""
    city = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    numbers = {"a": {"type": "number"}, "b": {"type": "number"}}
    parameters = {
        "get_weather": ("The weather in a city.", city),
        "add": ("Adds two numbers.", {"type": "object", "properties": numbers, "required": ["a", "b"]}),
        "get_time": ("The time in a city.", city),
    }
    tools = [
        {"type": "function", "function": {"name": name, "description": text, "parameters": schema}}
        for name, (text, schema) in parameters.items()
    ]
    messages = user("What is the weather in Lisbon?")
    asked = chat(live, messages, tools=tools, max_tokens=60)["choices"][0]
    assert asked["finish_reason"] == "tool_calls"
    (call,) = asked["message"]["tool_calls"]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("get_weather", {"city": "Lisbon"})
    result = {"role": "tool", "tool_call_id": call["id"], "content": "Sunny, 21 degrees in Lisbon."}
    answer = chat(live, [*messages, asked["message"], result], tools=tools, max_tokens=60)
    assert "21" in said(answer)


def test_stop_strings(live):
    answer = chat(live, PROMPTS["short"], stop=["France is", "unsaid"])
    assert (said(answer), answer["choices"][0]["finish_reason"]) == ("The capital of ", "stop")


def test_choices_are_those_of_their_seeds(live):
    ask = {"messages": PROMPTS["list"], "temperature": 0.9, "max_tokens": 12}
    both = chat(live, n=2, seed=7, **ask)
    assert [said(both, 0), said(both, 1)] == [said(chat(live, seed=seed, **ask)) for seed in (7, 8)]
    assert said(both, 0) != said(both, 1)


def test_a_snapshot_goes_on_as_its_session(live):
    first = chat(live, PROMPTS["system"], session_id="first")
    content = live.http.get("/v1/sessions/first/snapshot?kv=true").content
    assert live.http.put("/v1/sessions/second/snapshot", content=content).is_success
    turn = [*PROMPTS["system"], {"role": "assistant", "content": said(first)}, *user("And the grass?")]
    answers = [chat(live, turn, session_id=name) for name in ("first", "second")]
    assert said(answers[0]) == said(answers[1]) == said(chat(live, turn))
    assert answers[1]["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_a_session_goes_on_after_a_restart(live, smollm2, tmp_path):
    messages, flags = PROMPTS["turns"], ("--session-dir", str(tmp_path))
    with serve(smollm2, *flags) as server:
        first = chat(server, messages, session_id="kept")
    turn = [*messages, {"role": "assistant", "content": said(first)}, *user("Spell it backwards.")]
    with serve(smollm2, *flags) as server:
        second = chat(server, turn, session_id="kept")
    assert second["pacellm"]["session"] in ("restored", "replayed")
    assert said(second) == said(chat(live, turn))


def test_its_file_is_the_same_model(smollm2, live):
    """The checkpoint was made from the GGUF file: read directly, both are equal to the bit."""
    read, module = load(gguf_file("smollm2")), live.engine.model.module
    theirs = {name.replace(".original.", "."): weight for name, weight in module.named_parameters()}
    for name, weight in read.module.named_parameters():
        assert torch.equal(weight, theirs[name.replace(".original.", ".")]), name
    assert read.eos_token_ids == live.engine.model.eos_token_ids
    mine = ChatTokenizer(gguf_file("smollm2"))
    assert mine.backend.to_str() == ChatTokenizer(smollm2).backend.to_str()
    assert mine.render(PROMPTS["system"]) == live.service.tokenizer.render(PROMPTS["system"])


def test_a_damaged_file_is_refused_soon(smollm2, tmp_path):
    with gguf_file("smollm2").open("rb") as file:
        (tmp_path / "cut.gguf").write_bytes(file.read(10**7))
    with pytest.raises(PaceError, match="cut short"):
        check_gguf(tmp_path / "cut.gguf")
