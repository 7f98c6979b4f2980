"""The OpenAPI document holds: schemathesis asks every endpoint, with requests that fit the document and with such that
do not."""

import itertools
import uuid

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


def known(server):
    """What paths may name: a session, the model, a stored response."""
    server.http.post("/v1/sessions", json={"session_id": "known"}, headers=KEY)
    made = server.http.post("/v1/responses", json={"input": "hi", "max_output_tokens": 1}, headers=KEY).json()
    return {"name": "known", "model": NAME, "response_id": made["id"], "request_id": made["id"]}


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("operation", OPERATIONS, ids=" ".join)
def test_an_operation_keeps_to_the_document(operation, mode, api, strict):
    method, path = operation
    described = api[path][method]
    if mode is GenerationMode.NEGATIVE and not (described.body or list(described.iter_parameters())):
        pytest.skip("takes nothing")

    checks = CHECKS if mode is GenerationMode.POSITIVE else [*CHECKS, negative_data_rejection]
    turns = itertools.count()

    @BOUNDS
    @given(case=described.as_strategy(generation_mode=mode))
    def hold(case):
        if mode is GenerationMode.POSITIVE:
            if "Idempotency-Key" in (case.headers or {}):
                case.headers["Idempotency-Key"] = uuid.uuid4().hex  # two cases are no repetition
            if case.path_parameters and next(turns) % 2:
                case.path_parameters = known(strict)
        answer = case.call(base_url=strict.url, headers=KEY, timeout=20)
        case.validate_response(answer, checks=checks)
        if answer.status_code >= 400 and not OPERATIONS[operation].is_public:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

    hold()


def test_the_document_is_that_of_the_routes(strict):
    described = strict.http.get("/openapi.json", headers=KEY).json()
    found = {(method.upper(), path) for path, methods in described["paths"].items() for method in methods}
    assert found == set(OPERATIONS)
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
