"""Memory for bodies that are being received: a budget for all, and a share of it for each tenant."""

from __future__ import annotations

from collections import Counter
from types import TracebackType

from pacellm.errors import Overloaded

_FREE = 64 * 1024  # bytes of a body that count for nothing: most have no more


class BodyBudget:
    """What bodies hold together. Used on the event loop alone.

    Args:
        most: bytes; a tenant may hold half of them.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._held: Counter[str] = Counter()

    @property
    def num_bytes(self) -> int:
        """Bytes that are held."""
        return self._held.total()

    def claim(self, tenant: str) -> Claim:
        """Room for one body, given back when the block ends."""
        return Claim(self, tenant)

    def hold(self, tenant: str, more: int) -> None:
        """Add to what a tenant holds.

        Raises:
            Overloaded: that would be more than its share, or than all may hold.
        """
        if self._held[tenant] + more > self._most // 2:
            raise Overloaded(
                "this key sends too many large bodies at once; send them one after another", retry_after=1,
                code="rate_limit_exceeded",
            )  # fmt: skip
        if self.num_bytes + more > self._most:
            raise Overloaded("too many large bodies are being received; try again later", retry_after=1)
        self._held[tenant] += more

    def release(self, tenant: str, held: int) -> None:
        """Give room back."""
        self._held[tenant] -= held
        if not self._held[tenant]:
            del self._held[tenant]


class Claim:
    """What one body holds of a budget."""

    def __init__(self, budget: BodyBudget, tenant: str) -> None:
        self._budget, self._tenant, self._held = budget, tenant, 0

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()

    def release(self) -> None:
        """Give the room back; the body is gone."""
        self._budget.release(self._tenant, self._held)
        self._held = 0

    def grow(self, size: int) -> None:
        """The body has so many bytes now.

        Raises:
            Overloaded: there is no room for them.
        """
        more = max(0, size - _FREE) - self._held
        if more > 0:
            self._budget.hold(self._tenant, more)
            self._held += more
