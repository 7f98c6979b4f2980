"""Which paths and methods there are, and what is said of those that there are not."""

import re
from pathlib import Path

import openai
import pytest

from pacellm.server import unserved
from pacellm.server.api.openapi.operations import OPERATIONS
from tests.server.conftest import NAME

PAGE = (Path(__file__).parents[2] / "docs" / "compatibility.md").read_text()
METHODS = ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT", "OPTIONS", "TRACE")
TAKES: dict[str, set[str]] = {}
for _method, _path in OPERATIONS:
    TAKES.setdefault(_path.replace("{model}", NAME), set()).add(_method)


def error_of(answer):
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize("path", TAKES)
def test_allow_lists_what_a_path_takes(live, path):
    takes = TAKES[path] | ({"HEAD"} if "GET" in TAKES[path] else set())
    named = re.sub(r"\{\w+\}", "x", path)
    for method in set(METHODS) - takes:
        answer = live.http.request(method, named)
        assert answer.status_code == 405, method
        assert answer.headers["allow"].split(", ") == sorted(takes)
        if method != "HEAD":
            assert error_of(answer)["code"] in ("method_not_allowed", "not_served")


@pytest.mark.parametrize("path", [path for path, methods in TAKES.items() if "GET" in methods])
def test_head_is_get_without_the_body(live, path):
    named = re.sub(r"\{\w+\}", "x", path)
    got, head = live.http.get(named), live.http.head(named)
    assert (head.status_code, head.content) == (got.status_code, b"")
    assert head.headers["content-type"] == got.headers["content-type"]
    if path not in ("/health", "/metrics"):  # they change
        assert head.headers["content-length"] == got.headers["content-length"]
    assert live.http.get("/v1/models").json()["data"]  # the connection goes on


@pytest.mark.parametrize(
    "path",
    ["/v1", "/docs/x", "/v1/nothing", "/v1/models_", "/v1/responses/x/y", "/v1/responses/x/input_items/y",
     "/v1/sessions/x/y", "/v1/sessions/x/fork/y", "/v1/requests/x", "/v1/completions/x", "/tokenize/x", "/health/x"],
)  # fmt: skip
def test_what_is_below_a_route_is_not_there(live, path):
    for method in ("GET", "POST", "DELETE", "PUT", "PATCH"):
        answer = live.http.request(method, path)
        assert (answer.status_code, error_of(answer)["code"]) == (404, "not_found"), method
        assert "allow" not in answer.headers


UNSERVED = {
    ("POST", "/v1/embeddings"): "embeddings", ("POST", "/v1/images/generations"): "images",
    ("POST", "/v1/images/edits"): "images", ("POST", "/v1/audio/speech"): "audio",
    ("POST", "/v1/audio/transcriptions"): "audio", ("POST", "/v1/videos"): "videos",
    ("POST", "/v1/moderations"): "moderations", ("GET", "/v1/files"): "files", ("POST", "/v1/files"): "files",
    ("POST", "/v1/uploads"): "files", ("GET", "/v1/vector_stores/x"): "vector stores",
    ("POST", "/v1/fine_tuning/jobs"): "fine-tuning", ("POST", "/v1/batches"): "batches",
    ("POST", "/v1/assistants"): "assistants", ("POST", "/v1/threads/x/runs"): "threads",
    ("POST", "/v1/conversations"): "conversations", ("GET", "/v1/chat/completions/x"): "stored chat completions",
    ("GET", "/v1/chat/completions/x/messages"): "stored chat completions",
    ("POST", "/v1/responses/x/cancel"): "background", ("POST", "/v1/responses/compact"): "compaction",
    ("POST", "/v1/responses/input_tokens"): "/tokenize", ("POST", "/v1/realtime/sessions"): "realtime",
    ("POST", "/v1/rerank"): "reranking", ("POST", "/v1/messages"): "Anthropic", ("POST", "/api/chat"): "Ollama",
    ("POST", "/chat/completions"): "/v1", ("GET", "/models"): "/v1",
}  # fmt: skip


@pytest.mark.parametrize(("method", "path"), UNSERVED)
def test_what_others_have_is_named(live, method, path):
    answer = live.http.request(method, path)
    error = error_of(answer)
    assert (answer.status_code, error["code"]) == (404, "not_served")
    assert UNSERVED[method, path] in error["message"]
    assert path in error["message"]


def test_lists_of_stored_chat_completions_are_named(live):
    answer = live.http.get("/v1/chat/completions")
    assert (answer.status_code, answer.headers["allow"], error_of(answer)["code"]) == (405, "POST", "not_served")


def test_clients_are_told(live):
    with pytest.raises(openai.NotFoundError, match="embeddings: not served here") as caught:
        live.client.embeddings.create(model=NAME, input="x")
    assert caught.value.code == "not_served"


def test_the_page_says_at_once_what_is_not_served():
    top = PAGE[: PAGE.index("\n## ")]
    for one in unserved.UNSERVED:
        assert one.name in top, one.name
