"""The request router: a session's requests go to the replica that holds it, all others where a hash ring says.

A full holder is waited for: another replica would have to take the session away from it.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from deploy.ray.requests import session_key
from deploy.ray.table import SessionTable
from pacellm.server.auth import read_keys
from ray.serve._private.common import ReplicaID
from ray.serve._private.request_router.common import PendingRequest
from ray.serve._private.request_router.replica_wrapper import RunningReplica
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter


class SessionRouter(ConsistentHashRouter):
    """Ray Serve's hash ring, behind a table of what replicas report.

    Kwargs (``request_router_kwargs``), beside those of ``ConsistentHashRouter``:
        api_key, api_key_file: as ``pacellm serve`` has them, so that equal names of two tenants are two sessions.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        """Called once, with the kwargs."""
        file = kwargs.pop("api_key_file", None)
        self._keys = read_keys(kwargs.pop("api_key", []), None if file is None else Path(file))
        self._table = SessionTable()
        super().initialize_state(**kwargs)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """The replicas that run, and their reports."""
        super().update_replicas(replicas)
        self._table.update({one.replica_id: (one.routing_stats or {}).get("sessions", b"") for one in replicas})

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The holder alone, or the ring's replicas in its order."""
        key = self._session(pending_request)
        holder = self._replicas.get(self._table.holder(key)) if key is not None else None
        if holder is None or pending_request is None:
            return await super().choose_replicas(candidate_replicas, pending_request)
        pending_request.routing_context.should_backoff = True
        return [[holder]]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Remember where a session's request went until the replica reports it."""
        key = self._session(pending_request)
        if key is not None:
            self._table.sent(key, replica_id)

    def _routing_key(self, pending_request: PendingRequest | None) -> str | None:
        key = self._session(pending_request)
        return super()._routing_key(pending_request) if key is None else f"{key:016x}"

    def _session(self, pending_request: PendingRequest | None) -> int | None:
        """The digest of a request's session. The proxy of this process has pickled its scope."""
        if pending_request is None or not pending_request.args:
            return None
        request = pending_request.args[0]
        if isinstance(request, bytes):
            request = pickle.loads(request)
        scope = getattr(request, "_asgi_scope", None)
        return None if scope is None else session_key(scope, self._keys)
