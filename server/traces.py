"""OpenTelemetry spans, one a request, named as its conventions for generative AI ask. Needs the extra ``otel``.

A span says how long and how much: never what was asked or answered, and nothing that names a session or tenant.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

import pacellm
from pacellm.errors import ConfigError
from pacellm.types import Admitted, ChoiceEnded, Delta, Event, Failed, Finished, GenerationRequest

_PARENTS = TraceContextTextMapPropagator()


def exporter(endpoint: str) -> SpanProcessor:
    """Sends spans in batches, from a thread of its own.

    Args:
        endpoint: an OTLP collector over HTTP; without a path, ``/v1/traces`` is meant.

    Raises:
        ConfigError: it is no such address.
    """
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            f"--otlp-endpoint {endpoint!r} is no address of a collector; write it as http://host:4318",
            param="otlp_endpoint",
        )
    path = parts.path if parts.path.strip("/") else "/v1/traces"
    return BatchSpanProcessor(OTLPSpanExporter(endpoint=parts._replace(path=path).geturl()))


class Traces:
    """The spans of the requests that are queued or run; used on the event loop alone.

    Args:
        processor: gets every span that has ended.
        model_name: the name that clients ask for.
    """

    def __init__(self, processor: SpanProcessor, model_name: str) -> None:
        resource = Resource.create({"service.name": "pacellm", "service.version": pacellm.__version__})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("pacellm", pacellm.__version__)
        self._model = model_name
        self._open: dict[str, _Trace] = {}

    def start(self, request: GenerationRequest, http_id: str | None, parent: str | None) -> None:
        """A request was queued.

        Args:
            http_id: its X-Request-ID, as log lines have it.
            parent: its ``traceparent`` header.
        """
        operation = "text_completion" if request.request_id.startswith("cmpl-") else "chat"
        span = self._tracer.start_span(
            f"{operation} {self._model}",
            context=_PARENTS.extract({"traceparent": parent}) if parent is not None else None,
            kind=SpanKind.SERVER,
            attributes=_asked(request, operation, self._model, http_id),
        )
        span.add_event("queued")
        self._open[request.request_id] = _Trace(span)

    def observe(self, request_id: str, event: Event) -> None:
        """An event of a request, known or not."""
        trace = self._open.get(request_id)
        if trace is not None and trace.observe(event):
            del self._open[request_id]

    def fail(self, request_id: str, reason: str) -> None:
        """End a request's span, where it is still open, as one that failed for this reason."""
        trace = self._open.pop(request_id, None)
        if trace is not None:
            trace.fail(reason)

    def close(self) -> None:
        """Send what has not been sent; waits for the collector."""
        for request_id in list(self._open):
            self.fail(request_id, "shutdown")
        self._provider.shutdown()


class _Trace:
    """One request's span, and how far it is."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self._has_token = self._decodes = False
        self._reasons: list[str] = []

    def observe(self, event: Event) -> bool:
        """Note an event, when it reached the event loop; whether it was the last."""
        if isinstance(event, Delta):
            self._note_tokens(event)
        elif isinstance(event, Admitted):
            if event.session == "restored":
                self._span.add_event("restore", {"pacellm.restored_tokens": event.cached_tokens})
            self._span.add_event("prefill", {"pacellm.cached_tokens": event.cached_tokens})
        elif isinstance(event, ChoiceEnded):
            self._reasons.append(event.reason.value)
        elif isinstance(event, Failed):
            self.fail(event.error.code or event.error.type)
        elif isinstance(event, Finished):
            self._span.set_attributes(_answered(event, self._reasons or [event.reason.value]))
            self._span.end()
        return isinstance(event, Finished | Failed)

    def _note_tokens(self, event: Delta) -> None:
        if event.token_ids and not self._decodes:
            self._span.add_event("decode" if self._has_token else "first_token")
            self._decodes, self._has_token = self._has_token, True

    def fail(self, reason: str) -> None:
        """End it. The error's message stays out: it may quote the request."""
        self._span.set_attribute("error.type", reason)
        self._span.set_status(StatusCode.ERROR)
        self._span.end()


def _asked(request: GenerationRequest, operation: str, model: str, http_id: str | None) -> dict[str, Any]:
    sampling = request.sampling
    found = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "pacellm",
        "gen_ai.request.model": model,
        "gen_ai.request.choice.count": request.n if request.n > 1 else None,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.top_k": sampling.top_k if sampling.top_k > 0 else None,
        "gen_ai.request.seed": sampling.seed,
        "gen_ai.request.presence_penalty": sampling.presence_penalty or None,
        "gen_ai.request.frequency_penalty": sampling.frequency_penalty or None,
        "pacellm.request_id": http_id,
        "pacellm.pa": request.pa,
        "pacellm.has_session": request.session is not None,
        "pacellm.append": request.append is not None,
    }
    return {name: value for name, value in found.items() if value is not None}


def _answered(event: Finished, reasons: list[str]) -> dict[str, Any]:
    usage, bank = event.usage, event.bank
    found: dict[str, Any] = {
        "gen_ai.response.finish_reasons": reasons,
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.output_tokens": usage.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
        "gen_ai.response.time_to_first_chunk": event.queue_seconds + event.prefill_seconds,
        "pacellm.replayed_tokens": usage.replayed_tokens,
        "pacellm.session.status": event.session,
        "pacellm.session.dropped_tokens": event.kinship.dropped_tokens,
        "pacellm.pa": event.pa,
        "pacellm.queue_seconds": event.queue_seconds,
        "pacellm.prefill_seconds": event.prefill_seconds,
        "pacellm.decode_seconds": event.decode_seconds,
    }
    if bank is not None:
        for name in ("hits", "fuses", "misses", "empty", "merges", "replacements", "effective_rank"):
            found[f"pacellm.bank.{name}"] = getattr(bank, name)
    if not usage.completion_tokens:
        del found["gen_ai.response.time_to_first_chunk"]
    return found
