"""PaceLLM as a Ray Serve application: ``serve deploy deploy/ray/serve.yaml``.

The same app as ``pacellm serve``, one engine a replica. ``args.serve`` are flags of ``pacellm serve``; those of the
listening socket belong to Ray's ``http_options``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from deploy.ray.flags import parse_flags
from deploy.ray.report import held_sessions
from deploy.ray.table import write_report
from pacellm.cli.serve import build
from pacellm.server import logs
from pacellm.server.app import create_admin_app, create_app
from ray import serve
from ray.serve.config import RequestRouterConfig


@serve.deployment(name="PaceLLM")
@serve.ingress()
class Replica:
    """One engine.

    Args:
        flags: of ``pacellm serve``.
    """

    def __init__(self, flags: Sequence[str]) -> None:
        options = parse_flags(flags)
        logs.configure(options.log_level, options.log_format)
        self._service, self._keys, self._team = build(options)
        self._admin: asyncio.Task[None] | None = None

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return create_app(self._service, self._keys)

    async def record_routing_stats(self) -> dict[str, Any]:
        """What the router is told: the sessions that this replica holds."""
        self._start_admin()
        return {"sessions": write_report(held_sessions(self._service.engine.sessions))}

    async def check_health(self) -> None:
        """Raises where the engine has stopped or does not beat: Ray replaces the replica."""
        thread, limit = self._service.thread, self._service.settings.heartbeat_limit
        age = time.monotonic() - thread.heartbeat
        if not thread.is_alive or age > limit:
            raise RuntimeError(
                f"the engine is {'silent' if thread.is_alive else 'dead'}; last heartbeat {age:.0f} s ago"
            )

    def _start_admin(self) -> None:
        """Metrics of this replica on a port of its own, where ``--admin-port`` asks for that."""
        port = self._service.settings.admin_port
        if port is None or self._admin is not None:
            return
        app = create_admin_app(self._service, self._keys)
        config = uvicorn.Config(app, host="0.0.0.0", port=port, log_config=None, access_log=False, ws="none")
        self._admin = asyncio.create_task(uvicorn.Server(config)._serve())


def build_app(args: dict[str, Any]) -> serve.Application:
    """What ``serve deploy`` imports.

    Args:
        args: ``serve``: flags of ``pacellm serve``; ``api_key_file`` among them reaches the router too.

    Raises:
        ConfigError: flags that cannot work here.
    """
    unknown = sorted(args.keys() - {"serve", "num_virtual_nodes", "report_seconds"})
    flags = [str(flag) for flag in args.get("serve", [])]
    options = parse_flags(flags, unknown=unknown)
    router = RequestRouterConfig(
        request_router_class="deploy.ray.router.SessionRouter",
        request_router_kwargs={
            "api_key": options.api_key,
            "api_key_file": None if options.api_key_file is None else str(options.api_key_file),
            "num_virtual_nodes": int(args.get("num_virtual_nodes", 100)),
        },
        request_routing_stats_period_s=float(args.get("report_seconds", 5.0)),
    )
    return Replica.options(request_router_config=router).bind(flags)
