"""Whether a JSON schema describes anything that ends: one in which every value needs another describes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_MAX_STEPS = 20_000  # schemas that are looked at; what is more is taken to end
_CONTAINERS = ["object", "array"]


def ends(schema: Mapping[str, Any]) -> bool:
    """Some JSON that the schema describes is finite, as far as local references tell."""
    return _Search(schema).ends(schema)


class _Search:
    """Looks for a finite value.

    Args:
        root: that references are into.
    """

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root, self._open, self._steps = root, set[str](), 0
        self._known: set[str] = set()  # references that end

    def ends(self, schema: Any) -> bool:
        self._steps += 1
        if not isinstance(schema, dict) or self._steps > _MAX_STEPS:
            return schema is not False
        if "const" in schema or "enum" in schema:
            return True
        return (
            self._reference_ends(schema.get("$ref"))
            and all(self.ends(one) for one in _listed(schema.get("allOf")))
            and self._one_ends(schema.get("anyOf"))
            and self._one_ends(schema.get("oneOf"))
            and self._value_ends(schema)
        )

    def _one_ends(self, choices: Any) -> bool:
        listed = _listed(choices)
        return not listed or any(self.ends(one) for one in listed)

    def _reference_ends(self, reference: Any) -> bool:
        if not isinstance(reference, str) or reference in self._known:
            return True
        if reference in self._open:
            return False
        self._open.add(reference)
        found = self.ends(self._at(reference))
        self._open.discard(reference)
        if found:
            self._known.add(reference)
        return found

    def _at(self, reference: str) -> Any:
        """What a local reference is to; True where it is another."""
        found: Any = self._root
        for part in reference.removeprefix("#").split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(found, dict) or key not in found:
                return True
            found = found[key]
        return found if reference.startswith(("#/", "#")) and (reference == "#" or "/" in reference) else True

    def _value_ends(self, schema: dict[str, Any]) -> bool:
        kinds = schema.get("type", "null")
        kinds = kinds if isinstance(kinds, list) else [kinds]
        if any(kind not in _CONTAINERS for kind in kinds):
            return True
        return ("object" in kinds and self._object_ends(schema)) or ("array" in kinds and self._array_ends(schema))

    def _object_ends(self, schema: dict[str, Any]) -> bool:
        properties, others = schema.get("properties"), schema.get("additionalProperties", True)
        known = properties if isinstance(properties, dict) else {}
        names = [name for name in _listed(schema.get("required")) if isinstance(name, str)]
        return all(self.ends(known[name]) if name in known else self.ends(others) for name in names)

    def _array_ends(self, schema: dict[str, Any]) -> bool:
        least, first = schema.get("minItems", 0), _listed(schema.get("prefixItems"))
        if not isinstance(least, int):
            return True
        rest = self.ends(schema.get("items", True)) if least > len(first) else True
        return rest and all(self.ends(one) for one in first[:least])


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
