"""A span a request: what it says, and what it must not say."""

import http.server
import threading
import time

import httpx
import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from pacellm.config import EngineConfig
from pacellm.errors import ConfigError
from pacellm.server.traces import Traces, exporter
from pacellm.types import Admitted, GenerationRequest
from tests.server.conftest import NAME, start


@pytest.fixture(scope="module")
def traced():
    kept = InMemorySpanExporter()
    with start(EngineConfig(kv_cache_memory=2**28), traces=Traces(SimpleSpanProcessor(kept), NAME)) as server:
        server.kept = kept
        yield server


@pytest.fixture
def ask(traced):
    traced.kept.clear()

    def ask(path="/v1/chat/completions", headers=None, **fields):
        body = {"model": NAME, "max_tokens": 4, "temperature": 0.5, **fields}
        if "chat" in path:
            body["messages"] = [{"role": "user", "content": "a secret matter"}]
        return traced.http.post(path, json=body, headers=headers)

    return ask


def spans(server, count=1):
    until = time.monotonic() + 20
    while len(found := server.kept.get_finished_spans()) < count and time.monotonic() < until:
        time.sleep(0.01)
    assert len(found) == count
    return found


def test_a_chat_is_a_span(traced, ask):
    usage = ask(seed=7, logit_bias={"2": -100}, headers={"X-Request-ID": "mine"}).json()["usage"]
    (span,) = spans(traced)
    told = dict(span.attributes)
    assert (span.name, span.kind, span.status.status_code) == (f"chat {NAME}", SpanKind.SERVER, StatusCode.UNSET)
    assert told["gen_ai.operation.name"] == "chat"
    assert told["gen_ai.request.model"] == NAME
    assert (told["gen_ai.request.max_tokens"], told["gen_ai.request.temperature"]) == (4, 0.5)
    assert told["gen_ai.request.seed"] == 7
    assert told["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert told["gen_ai.usage.output_tokens"] == usage["completion_tokens"] == 4
    assert told["gen_ai.usage.cache_read.input_tokens"] == 0
    assert told["gen_ai.response.finish_reasons"] == ("length",)
    assert told["pacellm.request_id"] == "mine"
    assert [event.name for event in span.events] == ["queued", "prefill", "first_token", "decode"]
    moments = [span.start_time, *(event.timestamp for event in span.events), span.end_time]
    assert moments == sorted(moments)
    seconds = sum(told[f"pacellm.{phase}_seconds"] for phase in ("queue", "prefill", "decode"))
    assert seconds > 0
    assert span.resource.attributes["service.name"] == "pacellm"


def test_no_content_and_no_session_is_told(traced, ask):
    ask(session_id="a-session-name")
    ask(session_id="a-session-name")
    first, second = spans(traced, 2)
    assert (first.attributes["pacellm.session.status"], second.attributes["pacellm.session.status"]) == (
        "new",
        "resident",
    )
    for span in (first, second):
        assert span.attributes["pacellm.has_session"]
        for hidden in ("a-session-name", "secret", "matter"):
            assert hidden not in span.to_json()


def test_a_response_keeps_its_name_to_itself(traced):
    traced.kept.clear()
    body = {"model": NAME, "input": "a secret matter", "max_output_tokens": 4}
    answer = traced.http.post("/v1/responses", json=body)
    (span,) = spans(traced)
    assert span.attributes["gen_ai.operation.name"] == "chat"
    assert answer.json()["id"] not in span.to_json()


def test_several_choices_and_prompts(traced, ask):
    ask(n=2, logit_bias={"2": -100})
    (span,) = spans(traced)
    assert span.attributes["gen_ai.request.choice.count"] == 2
    assert span.attributes["gen_ai.response.finish_reasons"] == ("length", "length")
    traced.kept.clear()
    ask("/v1/completions", prompt=["one", "two"])
    assert {span.attributes["gen_ai.operation.name"] for span in spans(traced, 2)} == {"text_completion"}


def test_the_callers_span_is_the_parent(traced, ask):
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    ask(headers={"traceparent": f"00-{trace}-{parent}-01"})
    (span,) = spans(traced)
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (trace, parent)
    traced.kept.clear()
    ask(headers={"traceparent": "nonsense"})
    assert spans(traced)[0].parent is None


def test_a_client_that_leaves_ends_its_span(traced, ask):
    body = {"model": NAME, "messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": 3000}
    body["logit_bias"] = {"2": -100}
    with (
        httpx.Client(base_url=traced.url) as client,
        client.stream("POST", "/v1/chat/completions", json=body) as answer,
    ):
        next(answer.iter_lines())
    (span,) = spans(traced)
    assert (span.status.status_code, span.attributes["error.type"]) == (StatusCode.ERROR, "cancelled")


def test_a_deadline_ends_its_span(traced, ask):
    assert ask(timeout=0.05, max_tokens=3000, logit_bias={"2": -100}).status_code == 504
    assert spans(traced)[0].attributes["error.type"] == "deadline_exceeded"


def test_what_is_refused_before_the_queue_has_no_span(traced, ask):
    assert ask(temperature=9).status_code == 400
    assert ask().status_code == 200
    spans(traced, 1)


def test_a_restored_session_says_so():
    kept = InMemorySpanExporter()
    traces = Traces(SimpleSpanProcessor(kept), NAME)
    traces.start(GenerationRequest("chatcmpl-1", [1, 2, 3], session=("t", "s")), None, None)
    traces.observe("chatcmpl-1", Admitted("restored", 2))
    traces.observe("somebody-else", Admitted("new", 0))
    traces.close()
    (span,) = kept.get_finished_spans()
    assert [event.name for event in span.events] == ["queued", "restore", "prefill"]
    assert span.events[1].attributes["pacellm.restored_tokens"] == 2
    assert span.attributes["error.type"] == "shutdown"


@pytest.mark.parametrize("endpoint", ["collector:4318", "ftp://host", "http://", ""])
def test_an_endpoint_that_is_none_is_refused(endpoint):
    with pytest.raises(ConfigError, match="write it as http") as caught:
        exporter(endpoint)
    assert caught.value.param == "otlp_endpoint"


def test_spans_arrive_at_a_collector():
    got = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            got.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Collector) as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        traces = Traces(exporter(f"http://127.0.0.1:{collector.server_port}"), NAME)
        traces.start(GenerationRequest("cmpl-1", [1]), None, None)
        traces.close()
        collector.shutdown()
        thread.join()
    ((path, body),) = got
    assert path == "/v1/traces"
    assert f"text_completion {NAME}".encode() in body
