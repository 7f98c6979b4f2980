"""The exception tree.

::

    PaceError
    ├── ConfigError              a flag or config field has a value that cannot work
    ├── ModelError               a checkpoint that cannot be served correctly, refused at load
    ├── RequestError             the client can put it right; names the field (``param``)
    │   ├── UnsupportedParameter a parameter that would change the result and is not implemented
    │   ├── ModelNotFound        an unknown model name
    │   ├── ContextLengthExceeded  prompt (or prompt + max_tokens) longer than the model's context
    │   ├── NotFound             a thing named in the path is not there, or not the caller's
    │   ├── Conflict             the same request is still being answered
    │   ├── BodyTimeout          the request's body did not come in time
    │   ├── BodyTooLarge         the request body is over the limit
    │   ├── UnsupportedEncoding  the request body is packed in a way that is not read
    │   ├── SessionNotFound      no such session in the caller's namespace; another's looks the same
    │   │   └── SessionLost      there was one, and its log is gone: nothing can be appended to it
    │   ├── NotAppendable        a session's history that nothing can be appended to
    │   ├── SessionExists        a session of that id is already there
    │   ├── SessionDeleted       the session was deleted while the request worked on it
    │   ├── SessionConflict      another server owns the session's latest state
    │   ├── BanksAway            a session's banks that are not in memory now
    │   └── SnapshotRefused      a snapshot that is damaged, foreign or not signed here
    ├── InvalidApiKey            no key, or a wrong one
    ├── Forbidden                a key that is not for this
    │   └── ForeignOrigin        a browser sent it for someone else's page
    ├── Overloaded               too much is to be done already: try again after ``retry_after`` seconds
    ├── Draining                 the server is shutting down
    ├── Aborted                  the request was cancelled
    ├── DeadlineExceeded         the request's deadline passed before it ended, or is expected to
    └── EngineError              a failure inside a step; fails one request
        └── EngineDead           the engine loop has ended; nothing can be served any more

Every class carries the HTTP ``status``, the OpenAI error ``type`` and ``code`` that API.md of the
HTTP surface gives it, so that the server maps an exception without a table of its own.
"""

from __future__ import annotations


class PaceError(Exception):
    """Base of everything raised on purpose."""

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class ConfigError(PaceError, ValueError):
    """A configuration value that cannot work."""


class ModelError(PaceError):
    """A checkpoint that this server would not serve correctly."""


class RequestError(PaceError):
    """A request that the client can put right; ``param`` names the field."""

    status = 400
    type = "invalid_request_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param=param)
        self.code = code if code is not None else type(self).code


class UnsupportedParameter(RequestError):
    """A parameter that would change the result and is not implemented: never accepted and ignored."""

    code = "unsupported_parameter"


class ModelNotFound(RequestError):
    """The request names a model that is not served here."""

    status = 404
    code = "model_not_found"


class ContextLengthExceeded(RequestError):
    """The prompt, or the prompt with ``max_tokens``, does not fit the model's context."""

    code = "context_length_exceeded"


class BodyTooLarge(RequestError):
    """The request body is over the configured limit."""

    status = 413


class UnsupportedEncoding(RequestError):
    """The request body is packed in a way that this server does not read."""

    status = 415
    code = "unsupported_content_encoding"


class NotFound(RequestError):
    """Not there, or another caller's: the two look the same."""

    status = 404
    code = "not_found"


class Conflict(RequestError):
    """An equal request is still being answered; ``retry_after`` is in seconds."""

    status = 409
    code = "request_in_progress"
    retry_after = 1


class BodyTimeout(RequestError):
    """The body stopped coming."""

    status = 408
    code = "body_timeout"


class InvalidApiKey(PaceError):
    """No key, or a wrong one."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class Forbidden(PaceError):
    """The caller is known, and this is not for it."""

    status = 403
    type = "permission_error"
    code = "forbidden"


class ForeignOrigin(Forbidden):
    """A browser sent it for a page that is not this server's."""

    code = "foreign_origin"


class SessionNotFound(RequestError):
    """No such session in the caller's namespace."""

    status = 404
    code = "session_not_found"


class SessionLost(SessionNotFound):
    """There was such a session, and its log is gone."""

    code = "session_lost"


class NotAppendable(RequestError):
    """A session's history that a request cannot go on from."""

    code = "session_not_appendable"


class SessionExists(RequestError):
    """A session of that id is already there."""

    status = 409
    code = "session_exists"


class SessionDeleted(RequestError):
    """The session was deleted while the request waited for it or worked on it."""

    status = 409
    code = "session_deleted"


class SessionConflict(RequestError):
    """Another server owns the session's latest state; what this request computed was dropped."""

    status = 409
    code = "session_conflict"


class BanksAway(RequestError):
    """A session's banks are below the tiers in which they can be looked at."""

    status = 409
    code = "banks_away"


class SnapshotRefused(RequestError):
    """A snapshot that is damaged, of another model or config, or not signed by this server."""

    code = "snapshot_refused"


class Overloaded(PaceError):
    """The queue is full, or the deadline is out of reach behind it; ``retry_after`` is in seconds."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"

    def __init__(self, message: str, *, retry_after: int = 5, code: str | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.code = code if code is not None else type(self).code


class Draining(PaceError):
    """The server is shutting down and takes no new work."""

    status = 503
    type = "service_unavailable"
    code = "draining"
    retry_after = 10


class Aborted(PaceError):
    """The request was cancelled before it ended."""

    status = 499
    type = "request_cancelled"
    code = "cancelled"


class DeadlineExceeded(PaceError):
    """The request's deadline passed before it ended, or is expected to; what it held is free again."""

    status = 504
    type = "timeout"
    code = "deadline_exceeded"


class EngineError(PaceError):
    """A failure inside a step; it fails one request."""


class EngineDead(EngineError):
    """The engine loop has ended."""

    status = 503
    type = "service_unavailable"


def reason(error: BaseException) -> str:
    """What a client may read of an error: of the system's own without the path, which is the server's affair."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return str(error) or type(error).__name__
