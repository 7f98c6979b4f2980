"""The live server of the HTTP tests."""

from tests.server.conftest import live

__all__ = ["live"]
