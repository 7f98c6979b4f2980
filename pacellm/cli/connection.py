"""A client of a server, and whether there is one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from pacellm.errors import PaceError


@contextmanager
def connected(url: str, key: str | None) -> Iterator[httpx.Client]:
    """A client of a server that answers.

    Args:
        url: with or without ``/v1``.
        key: API key; None sends none.

    Raises:
        PaceError: there is no server, or it does not take the key.
    """
    headers = {} if not key else {"Authorization": f"Bearer {key}"}
    base = url.rstrip("/").removesuffix("/v1")
    try:
        # the server says that it lives every few seconds, however long a prompt takes
        http = httpx.Client(base_url=base, headers=headers, timeout=httpx.Timeout(120.0, connect=10.0))
    except httpx.InvalidURL as error:
        raise PaceError(f"--url {url} is no URL: {error}; write it as http://127.0.0.1:8000") from error
    with http:
        _check(http, base, has_key=bool(key))
        yield http


def _check(http: httpx.Client, base: str, *, has_key: bool) -> None:
    try:
        response = http.get("/v1/models", timeout=10.0)
    except (httpx.UnsupportedProtocol, UnicodeError) as error:
        raise PaceError(f"--url {base} is no URL: {error}; write it as http://127.0.0.1:8000") from error
    except httpx.HTTPError as error:
        raise PaceError(
            f"no server answers at {base} ({error}); start one with `pacellm serve`, wait until it has loaded its "
            "model, or name another with --url"
        ) from error
    if response.status_code == 401:
        raise PaceError(
            f"the server at {base} {'does not know this API key' if has_key else 'wants an API key'}; give it with "
            "--api-key or the variable OPENAI_API_KEY"
        )
    if response.status_code != 200:
        raise PaceError(f"{base} is not a server of `pacellm serve`: {message(response)}")


def send(http: httpx.Client, method: str, path: str, *also: int) -> httpx.Response:
    """One request.

    Args:
        also: statuses that are no error, beside 200.

    Raises:
        PaceError: no answer, or another status.
    """
    try:
        response = http.request(method, path)
    except httpx.HTTPError as error:
        raise PaceError(f"no answer from the server: {error}") from error
    if response.status_code != 200 and response.status_code not in also:
        raise PaceError(message(response))
    return response


def message(response: httpx.Response) -> str:
    """What an error says."""
    try:
        body: Any = response.json()
        return body["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"the server answered {response.status_code}"
