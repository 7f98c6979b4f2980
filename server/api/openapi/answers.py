"""JSON schemas of answers."""

from __future__ import annotations

from typing import Any

from pacellm.config import ATTENTION_KERNELS, PRESETS
from pacellm.modes import MODES

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
FLAG: Schema = {"type": "boolean"}
OBJECT: Schema = {"type": "object"}


def ref(name: str) -> Schema:
    """A schema of the document by name."""
    return {"$ref": f"#/components/schemas/{name}"}


def one_of(*values: Any) -> Schema:
    """Listed values only."""
    return {"enum": list(values)}


def many(items: Schema) -> Schema:
    """A list."""
    return {"type": "array", "items": items}


def maybe(schema: Schema) -> Schema:
    """It, or null."""
    return {"anyOf": [schema, {"type": "null"}]}


def fields(optional: dict[str, Schema] | None = None, **required: Schema) -> Schema:
    """An object with these fields, and maybe more."""
    return {"type": "object", "properties": {**required, **(optional or {})}, "required": list(required)}


_SESSION = one_of("none", "new", "resident", "restored", "replayed", "folded", "lost")
_SPACE = fields(used=COUNT, size=maybe(COUNT))
_DURABLE = {"durable": one_of(False)}
_REASON = one_of("stop", "length", "tool_calls", None)
_PART = fields(type=one_of("output_text"), text=TEXT, annotations=many(OBJECT), logprobs=many(OBJECT))
_INPUT_PART, _ROLE = fields(type=one_of("input_text"), text=TEXT), one_of("system", "developer", "user")
_THOUGHT = fields(type=one_of("reasoning_text"), text=TEXT)
_STATUS = one_of("in_progress", "completed", "incomplete")

SCHEMAS: dict[str, Schema] = {
    "Error": fields(error=fields(message=TEXT, type=TEXT, param=maybe(TEXT), code=maybe(TEXT))),
    "Usage": fields(
        prompt_tokens=COUNT,
        completion_tokens=COUNT,
        total_tokens=COUNT,
        prompt_tokens_details=fields(cached_tokens=COUNT),
    ),
    "Report": fields(
        session_id=maybe(TEXT),
        session=_SESSION,
        note=maybe(TEXT),
        history_tokens=COUNT,
        dropped_tokens=COUNT,
        cached_tokens=COUNT,
        replayed_tokens=COUNT,
        pa=one_of(*MODES),
        bank=maybe(OBJECT),
        timings=fields(queue_ms=NUMBER, prefill_ms=NUMBER, decode_ms=NUMBER),
        optional={
            "memory": OBJECT,
            "experts": OBJECT,
            "trace": maybe(fields(tokens=many(TEXT), layers=OBJECT, left_out=COUNT)),
        },
    ),
    "ChatCompletion": fields(
        id=TEXT,
        object=one_of("chat.completion"),
        created=COUNT,
        model=TEXT,
        system_fingerprint=TEXT,
        choices=many(
            fields(
                {"stop_reason": {"type": ["string", "integer"]}},
                index=COUNT,
                message=fields(
                    role=one_of("assistant"), content=maybe(TEXT), refusal={"type": "null"}, annotations=many(OBJECT)
                ),
                logprobs=maybe(OBJECT),
                finish_reason=_REASON,
            )
        ),
        usage=ref("Usage"),
        pacellm=ref("Report"),
    ),
    "Completion": fields(
        {"pacellm": ref("Report")},
        id=TEXT,
        object=one_of("text_completion"),
        created=COUNT,
        model=TEXT,
        system_fingerprint=TEXT,
        choices=many(
            fields({"pacellm": ref("Report")}, index=COUNT, text=TEXT, logprobs=maybe(OBJECT), finish_reason=_REASON)
        ),
        usage=ref("Usage"),
    ),
    "ResponseItem": {
        "anyOf": [
            fields(id=TEXT, type=one_of("message"), status=_STATUS, role=one_of("assistant"), content=many(_PART)),
            fields(id=TEXT, type=one_of("reasoning"), status=_STATUS, summary=many(OBJECT), content=many(_THOUGHT)),
            fields(id=TEXT, type=one_of("function_call"), status=_STATUS, call_id=TEXT, name=TEXT, arguments=TEXT),
        ]
    },
    "Response": fields(
        id=TEXT,
        object=one_of("response"),
        created_at=COUNT,
        status=one_of("completed", "incomplete"),
        model=TEXT,
        output=many(ref("ResponseItem")),
        incomplete_details=maybe(fields(reason=one_of("max_output_tokens"))),
        previous_response_id=maybe(TEXT),
        conversation=maybe(fields(id=TEXT)),
        store=FLAG,
        metadata=OBJECT,
        usage=fields(
            input_tokens=COUNT,
            input_tokens_details=fields(cached_tokens=COUNT, cache_write_tokens=COUNT),
            output_tokens=COUNT,
            output_tokens_details=fields(reasoning_tokens=COUNT),
            total_tokens=COUNT,
        ),
        pacellm=ref("Report"),
    ),
    "ResponseItems": fields(
        object=one_of("list"), data=many(ref("InputItem")), first_id=maybe(TEXT), last_id=maybe(TEXT), has_more=FLAG
    ),
    "InputItem": {
        "anyOf": [
            ref("ResponseItem"),
            fields(id=TEXT, type=one_of("message"), status=_STATUS, role=_ROLE, content=many(_INPUT_PART)),
            fields(id=TEXT, type=one_of("function_call_output"), status=_STATUS, call_id=TEXT, output=TEXT),
        ]
    },
    "ResponseDeleted": fields(id=TEXT, object=one_of("response"), deleted=one_of(True)),
    "Tokens": fields({"token_strs": many(TEXT)}, count=COUNT, max_model_len=COUNT, tokens=many(COUNT)),
    "Text": fields(prompt=TEXT),
    "Model": fields(
        id=TEXT, object=one_of("model"), created=COUNT, owned_by=TEXT, max_model_len=COUNT, context_length=COUNT
    ),
    "Models": fields(object=one_of("list"), data=many(ref("Model"))),
    "Session": fields(
        {"bytes_added": OBJECT, "expires": maybe(COUNT), "ttl": maybe(NUMBER), **_DURABLE},
        id=TEXT,
        object=one_of("session"),
        forked_from=maybe(TEXT),
        created=COUNT,
        last_used=COUNT,
        tokens=COUNT,
        commits=COUNT,
        generation=COUNT,
        tier=one_of("device", "host", "disk", "log"),
        in_use=FLAG,
        bytes=fields(kv=COUNT, bank=COUNT, host=COUNT, history=COUNT, log=COUNT),
        bank=maybe(OBJECT),
    ),
    "Sessions": fields(
        object=one_of("list"), data=many(ref("Session")), first_id=maybe(TEXT), last_id=maybe(TEXT), has_more=FLAG
    ),
    "Bank": fields(
        id=TEXT,
        object=one_of("session.bank"),
        layer=COUNT,
        slots=COUNT,
        segment=COUNT,
        start=COUNT,
        filled=COUNT,
        writes=COUNT,
        effective_rank=NUMBER,
        cosines=many(many({"type": "integer", "minimum": -100, "maximum": 100})),
        usage=many(COUNT),
        age=many(COUNT),
        stamp=many(COUNT),
        writers=many(fields(stamp=COUNT, turn=COUNT, start=COUNT, end=COUNT, decoded=FLAG, text=TEXT, left_out=COUNT)),
    ),
    "SessionDeleted": fields(_DURABLE, id=TEXT, object=one_of("session.deleted"), deleted=one_of(True)),
    "SessionsDeleted": fields(_DURABLE, object=one_of("list.deleted"), deleted=COUNT),
    "Requests": fields(
        object=one_of("list"),
        data=many(
            fields(
                id=TEXT,
                object=one_of("request"),
                request_id=TEXT,
                session_id=maybe(TEXT),
                status=one_of("queued", "reading", "generating"),
                age_ms=COUNT,
                priority={"type": "integer"},
                prompt_tokens=COUNT,
                to_read=COUNT,
                read=COUNT,
                generated=COUNT,
                queue=maybe(fields(position=COUNT, prompt_tokens_ahead=COUNT, estimated_ms=maybe(COUNT))),
            )
        ),
        server=maybe(
            fields(
                running=COUNT,
                queued=COUNT,
                max_running=COUNT,
                max_queued=COUNT,
                sessions=OBJECT,
                memory=fields(device=_SPACE, banks=_SPACE, host=_SPACE, disk=_SPACE),
            )
        ),
    ),
    "Config": fields(object=one_of("config"), version=TEXT, model=OBJECT, engine=OBJECT, server=OBJECT),
    "Cancelled": fields(id=TEXT, object=one_of("request.cancelled"), cancelled=COUNT),
    "Health": fields(status=one_of("ok", "dead"), heartbeat_age_seconds=NUMBER),
    "Ready": fields(status=one_of("ready", "not ready")),
    "Version": fields(
        version=TEXT,
        attention_kernel=one_of("cpu", *ATTENTION_KERNELS[1:]),
        pa=one_of("off", *PRESETS),
        products=fields(kernel=one_of("torch", "onednn"), rows=COUNT, exact=FLAG),
    ),
}
