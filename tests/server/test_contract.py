"""The OpenAPI document holds: schemathesis asks every endpoint, with requests that fit the document and with such that
do not."""

import itertools
import re
import uuid
from collections import Counter

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from pacellm.config import EngineConfig
from pacellm.server.api.openapi.operations import OPERATIONS, TENSORS
from pacellm.server.auth import Keys
from tests.server.conftest import NAME, start

KEY = {"Authorization": "Bearer contract-key"}
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
BOUNDS = settings(
    max_examples=10, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


@schemathesis.serializer(TENSORS)
def as_bytes(_, value):
    """Whatever stands for a snapshot."""
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "replace")


@pytest.fixture(scope="module")
def strict():
    """A server with a key and so short a context that no answer takes long."""
    config = EngineConfig(kv_cache_memory=2**28, max_model_len=128)
    with start(config, keys=Keys({"contract-key": "contract"})) as server:
        yield server


@pytest.fixture(scope="module")
def api(strict):
    return schemathesis.openapi.from_url(f"{strict.url}/openapi.json", headers=KEY)


# why a body that fits the document may be refused: what no schema says, as code and field
UNSAID = {
    "names something that is not in the body, or not there": [
        ("invalid_value", r"(input|messages\.\d+\.(tool_call_id|name))"),
        ("invalid_value", r"tool_choice(\.function)?\.name"),
        ("invalid_value", r"tools\.\d+(\.function)?\.name"),  # two of one name
        ("(previous_response|conversation|session|item)_not_found", ".*"),
        ("not_found", "(response_id|request_id|layer)"), ("model_not_found", "model"),
        ("invalid_value", "after"),
    ],
    "beside a header": [("None", "session_id"), ("None", "prompt"), ("None", "truncate_prompt_tokens"),
                        ("invalid_value", "pacellm.append")],
    "beside another field": [
        ("mutually_exclusive_parameters", ".*"), ("invalid_value", "pacellm.commit"), ("None", "max_tokens"),
        ("None|invalid_value", "continue_final_message"), ("invalid_value", "structured_outputs|echo"),
        ("None|invalid_value", "ignore_eos"), ("unsupported_parameter", "parallel_tool_calls|tools|n"),
    ],
    "a language of its own": [
        ("invalid_value|unsupported_parameter", r"structured_outputs(\.\w+)?"),
        ("invalid_value|unsupported_parameter", r"(response_format\.json_schema|text\.format)\.schema.*"),
        ("invalid_value|unsupported_parameter", r"tools\.\d+(\.function)?\.parameters.*"),
        ("snapshot_refused", "None"),
    ],
    "how the server was started": [("None|unsupported_parameter|worse_answers", r"pacellm\..*"),
                                   ("api_keys_needed", "None")],
    "the model": [("unsupported_parameter", r"messages\.\d+\.reasoning.*|input|reasoning.*"), ("None", "logit_bias"),
                  ("context_length_exceeded", ".*")],
    "what else is there": [("session_exists", "session_id"), ("conversation_locked", ".*"), ("queue_full", "None"),
                           ("deadline_exceeded|deadline_out_of_reach", "None")],
}  # fmt: skip


def is_unsaid(answer):
    """A refusal for a reason that the document cannot tell."""
    error = answer.json()["error"]
    return any(
        re.fullmatch(code, str(error["code"])) and re.fullmatch(param, str(error["param"]))
        for reasons in UNSAID.values()
        for code, param in reasons
    )


def known(server):
    """What paths may name: a session, the model, a stored response."""
    server.http.post("/v1/sessions", json={"session_id": "known"}, headers=KEY)
    made = server.http.post("/v1/responses", json={"input": "hi", "max_output_tokens": 1}, headers=KEY).json()
    return {"name": "known", "layer": 1, "model": NAME, "response_id": made["id"], "request_id": made["id"]}


def kept(operation, mode, api, strict, examples):
    """Ask with generated requests; how often there was which status."""
    method, path = operation
    described = api[path][method]
    if mode is GenerationMode.NEGATIVE and not (described.body or list(described.iter_parameters())):
        pytest.skip("takes nothing")

    checks = CHECKS if mode is GenerationMode.POSITIVE else [*CHECKS, negative_data_rejection]
    turns, counts = itertools.count(), Counter()

    @settings(BOUNDS, max_examples=examples)
    @given(case=described.as_strategy(generation_mode=mode))
    def hold(case):
        if mode is GenerationMode.POSITIVE:
            if "Idempotency-Key" in (case.headers or {}):
                case.headers["Idempotency-Key"] = uuid.uuid4().hex  # two cases are no repetition
            if case.path_parameters and next(turns) % 2:
                case.path_parameters = known(strict)
        answer = case.call(base_url=strict.url, headers=KEY, timeout=20)
        is_late = answer.status_code == 504  # it was given no time
        case.validate_response(answer, checks=[one for one in checks if not (is_late and one is not_a_server_error)])
        if mode is GenerationMode.POSITIVE and answer.status_code >= 400:
            assert is_unsaid(answer), (answer.text, case.body)
        counts[answer.status_code] += 1
        if answer.status_code >= 400 and not OPERATIONS[operation].is_public:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

    hold()
    return counts


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("operation", OPERATIONS, ids=" ".join)
def test_an_operation_keeps_to_the_document(operation, mode, api, strict):
    kept(operation, mode, api, strict, 10)


@pytest.mark.slow
@pytest.mark.parametrize("operation", [one for one in OPERATIONS if OPERATIONS[one].body is not None], ids=" ".join)
def test_bodies_that_fit_are_answered(operation, api, strict):
    counts = kept(operation, GenerationMode.POSITIVE, api, strict, 200)
    if OPERATIONS[operation].body != TENSORS:
        assert sum(count for status, count in counts.items() if status < 400) > counts.total() / 4, counts


def test_messages_are_told_apart_by_role(strict):
    schemas = strict.http.get("/openapi.json", headers=KEY).json()["components"]["schemas"]
    mapping = schemas["Message"]["discriminator"]["mapping"]
    assert set(mapping) == {"system", "developer", "user", "assistant", "tool"}
    for role, ref in mapping.items():
        schema = schemas[ref.rpartition("/")[2]]
        assert schema["properties"]["role"] == {"const": role}
        assert ("tool_call_id" in schema["required"]) == (role == "tool")
        assert (schema["properties"]["tool_calls"] != {"type": "null"}) == (role == "assistant")
        assert schema["additionalProperties"] == (role == "assistant")


def test_the_document_is_that_of_the_routes(strict):
    described = strict.http.get("/openapi.json", headers=KEY).json()
    found = {(method.upper(), path) for path, methods in described["paths"].items() for method in methods}
    assert found == set(OPERATIONS)
    tags = [one["tags"] for methods in described["paths"].values() for one in methods.values()]
    assert {name for (name,) in tags} == {one["name"] for one in described["tags"]}
    assert strict.http.get("/openapi.json").status_code == 401


def test_every_operation_but_health_wants_a_key(strict):
    for (method, path), operation in OPERATIONS.items():
        answer = strict.http.request(method, path.replace("{", "").replace("}", ""))
        assert (answer.status_code == 401) != operation.is_public, path


def test_examples_work(live):
    for (method, path), operation in OPERATIONS.items():
        if operation.example is not None and "{" not in path:
            live.http.delete("/v1/sessions")
            answer = live.http.request(method, path, json=operation.example)
            assert answer.status_code == operation.status, answer.text
