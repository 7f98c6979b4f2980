"""The OpenAPI document of this server, made from its routes and the schemas that check its bodies."""

from .document import document

__all__ = ["document"]
