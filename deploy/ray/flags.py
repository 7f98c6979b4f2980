"""Flags of ``pacellm serve`` as they are under Ray Serve."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from pacellm.cli.main import serve_options
from pacellm.errors import ConfigError

_NOT_HERE = {
    "--host": "http_options.host",
    "--port": "http_options.port",
    "--ssl-certfile": "http_options or the load balancer before Ray",
    "--ssl-keyfile": "http_options or the load balancer before Ray",
    "--shutdown-timeout": "graceful_shutdown_timeout_s of the deployment",
}


def parse_flags(flags: Sequence[str], unknown: Sequence[str] = ()) -> argparse.Namespace:
    """The options.

    Args:
        unknown: names beside ``serve`` that nobody knows.

    Raises:
        ConfigError: flags that are unknown or have no effect here, or a directory that several replicas cannot share.
    """
    if unknown:
        raise ConfigError(f"args has unknown names {', '.join(unknown)}; flags of pacellm serve go into args.serve")
    for flag in flags:
        name = flag.partition("=")[0]
        if name in _NOT_HERE:
            raise ConfigError(f"{name} has no effect under Ray Serve; set {_NOT_HERE[name]}", param="serve")
    try:
        options = serve_options(flags)
    except SystemExit:
        raise ConfigError(f"args.serve is not understood by pacellm serve: {' '.join(flags)}", param="serve") from None
    if options.session_dir is not None and not options.session_sync:
        raise ConfigError(
            "replicas share --session-dir, and a commit that is not on disk cannot be taken over: add --session-sync",
            param="session_sync",
        )
    return options
