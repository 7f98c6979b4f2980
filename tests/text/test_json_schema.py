"""Every keyword of JSON Schema at its edges: what is generated is what the schema describes, or it is refused."""

import contextlib
import json
import random

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pacellm.errors import RequestError
from pacellm.text import constraints, sandbox
from pacellm.text.json_schema import MAX_LENGTH, enforceable

END = 256
TOKENIZER = sandbox.build([*(bytes([byte]) for byte in range(256)), b""], [END], [END])
_INT64 = 2**63


def matcher(schema, is_strict=True):
    """At the beginning of what a schema describes, byte by byte."""
    made = sandbox.new_matcher(TOKENIZER, constraints.of_json(schema, "x", is_strict=is_strict).text())
    assert not made.is_error(), made.get_error()
    return made


def sampled(made, rng, most=250):
    """Something the grammar allows, drawn so that it tends to end; None where it is longer than ``most`` bytes."""
    written = b""
    while len(written) < most:
        allowed = (
            np.unpackbits(np.frombuffer(made.compute_bitmask(), np.uint8), bitorder="little").nonzero()[0].tolist()
        )
        assert allowed, written
        assert not made.is_error(), made.get_error()
        ends = [token for token in allowed if token == END or bytes([token]) in b'"]}']
        token = rng.choice(ends if ends and rng.random() < 0.3 else allowed)
        if token == END:
            return written
        made.consume_token(token)
        written += bytes([token])
        if made.is_stopped():
            return written
    return None


def accepts(schema, text):
    """The grammar may write this text, and end."""
    made, data = matcher(schema), list(text.encode())
    if made.validate_tokens(data) < len(data):
        return False
    made.consume_tokens(data)
    return made.is_accepting()


def listed(**kinds):
    return [
        pytest.param(schema, id=f"{kind}-{number}")
        for kind, many in kinds.items()
        for number, schema in enumerate(many)
    ]


NODE = {
    "type": "object", "required": ["v", "next"], "additionalProperties": False,
    "properties": {"v": {"type": "integer", "minimum": 0, "maximum": 3},
                   "next": {"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]}},
}  # fmt: skip
FINITE = {"type": "object", "properties": {"a": {"type": "null"}, "b": {"type": "null"}}}
HONOURED = listed(
    minimum=[{"type": "integer", "minimum": 5}, {"type": "integer", "minimum": -(2**53), "maximum": 2**53},
             {"minimum": 3},
             {"type": "number", "minimum": 0.1, "maximum": 0.3}, {"type": "number", "minimum": 5, "maximum": 5},
             {"type": "number", "minimum": 1e-15, "maximum": 1e-9}, {"type": "integer", "minimum": 2**53}],
    maximum=[{"type": "integer", "maximum": -(2**53)}, {"type": "integer", "minimum": 0, "maximum": _INT64 - 1}],
    exclusive=[{"type": "integer", "exclusiveMinimum": 1.5, "exclusiveMaximum": 3.5},
               {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 0.1},
               {"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, {"type": "number", "exclusiveMinimum": 0},
               {"type": "number", "minimum": -0.5, "exclusiveMaximum": 0}, {"type": "integer", "exclusiveMinimum": 0},
               {"allOf": [{"type": "number", "exclusiveMinimum": 0}, {"maximum": 0.25}]},
               {"type": "integer", "exclusiveMinimum": 2**53 - 2, "maximum": 2**53}],
    multipleOf=[{"type": "integer", "multipleOf": 7, "minimum": 10, "maximum": 30},
                {"type": "number", "multipleOf": 0.25},
                {"type": "integer", "multipleOf": 2.5}, {"type": "integer", "multipleOf": 9999},
                {"type": "integer", "multipleOf": 4, "allOf": [{"multipleOf": 6}]}],
    lengths=[{"type": "string", "minLength": 3, "maxLength": 4}, {"type": "string", "maxLength": 0}, {"maxLength": 1},
             {"type": "string", "minLength": 2.0, "maxLength": 3.0}, {"type": "string", "maxLength": MAX_LENGTH}],
    pattern=[{"type": "string", "pattern": "^a+$"}, {"type": "string", "pattern": "^[a-z]{2,3}$", "minLength": 3},
             {"type": "string", "pattern": r"^\d\w\s$"}, {"type": "string", "pattern": "^[^a]$"},
             {"allOf": [{"type": "string", "pattern": "^a"}, {"pattern": "^.{2}$"}]}],
    format=[*({"type": "string", "format": name} for name in ("date", "date-time", "time", "duration", "email",
            "hostname", "ipv4", "ipv6", "uuid", "uri")), {"type": "string", "format": "date", "pattern": "^2"},
            {"type": "integer", "format": "int32"}],
    items=[{"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 3},
           {"type": "array", "maxItems": 0},
           {"type": "array", "items": False}, {"type": "array", "items": {"enum": [1]}, "uniqueItems": False},
           {"type": "array", "items": {"enum": [1, 2]}, "minContains": 2}],
    prefixItems=[{"type": "array", "prefixItems": [{"type": "integer"}, {"const": "a"}], "items": False},
                 {"type": "array", "prefixItems": [{"type": "integer"}], "items": {"type": "null"}, "minItems": 3,
                  "maxItems": 4}, {"type": "array", "prefixItems": [{"type": "integer"}, {}], "maxItems": 1}],
    required=[{**FINITE, "required": ["b"]}, {**FINITE, "required": ["c"]}, {**FINITE, "required": ["a", "a"]}],
    additionalProperties=[{**FINITE, "additionalProperties": False},
                          {**FINITE, "additionalProperties": {"type": "null"}},
                          {"type": "object", "additionalProperties": {"type": "boolean"}}],
    patternProperties=[{"patternProperties": {"^x": {"type": "integer"}}, "additionalProperties": False},
                       {"type": "object", "properties": {"xa": {"type": "string"}},
                        "patternProperties": {"^x": {"maxLength": 2}}, "additionalProperties": False}],
    propertyNames=[{"type": "object", "propertyNames": {"type": "string"}},
                   {"type": "object", "propertyNames": {"enum": ["a", "b"]}, "additionalProperties": {"type": "null"}},
                   {"type": "object", "propertyNames": {"pattern": "^a"}, "additionalProperties": {"type": "null"}}],
    properties=[{"type": "object", "maxProperties": 0}, {"type": "object", "minProperties": 1.0},
                {**FINITE, "minProperties": 2, "maxProperties": 3, "required": ["a", "b"]}],
    dependent=[{**FINITE, "dependentRequired": {}, "dependentSchemas": {}}],
    enum=[{"enum": [1, "a", None, [1, 2], {"k": 1.5}]}, {"type": "integer", "enum": ["a", 1, 5], "minimum": 4},
          {"enum": [2**53, -(2**53), 0, -0.0, 1e-7, 0.1 + 0.2]},
          {"type": "string", "enum": ["a", "bb"], "minLength": 2}],
    const=[{"const": {"a": {"b": []}}}, {"const": None}, {"const": "a\u0001\n\u007fé"[:3]}, {"const": "é\n\\\"/"}],
    oneOf=[{"oneOf": [{"type": "integer"}, {"type": "string", "maxLength": 2}]},
           {"oneOf": [{"type": "object", "properties": {"k": {"const": name}}, "required": ["k"],
                       "additionalProperties": False} for name in "ab"]}],
    anyOf=[{"anyOf": [{"type": "integer"}, {"type": "null"}]}, {"anyOf": [False, {"const": 1}]},
           {"type": "integer", "anyOf": [{"minimum": 3}, {"maximum": -3}]}],
    allOf=[{"allOf": [{"type": "integer", "minimum": 1}, {"maximum": 3}]},
           {"allOf": [{**FINITE, "required": ["a"]}, {"properties": {"b": {"type": "null"}}, "required": ["b"]}]}],
    ref=[{"$ref": "#/$defs/a", "$defs": {"a": {"type": "integer", "minimum": 1, "maximum": 2}}},
         {"$ref": "#/$defs/a", "minimum": 2, "$defs": {"a": {"type": "integer", "maximum": 3}}},
         {"$ref": "#/$defs/n", "$defs": {"n": NODE}}, {"$ref": "#/$defs/a~0b~1c", "$defs": {"a~b/c": {"type": "null"}}},
         {"type": "array", "items": {"$ref": "#"}, "maxItems": 2}, {"anyOf": [{"type": "null"}, {"$ref": "#"}]}],
    conditions=[{"type": "integer", "then": {"minimum": 3}, "else": False}],
    annotations=[{"title": "x", "description": "y", "default": 1, "examples": [1], "foo": 1, "type": "null"}],
    unbounded=[{}, {"type": "object"}, {"type": "array"}, {"type": "string"}, {"type": "number"}, {"type": "boolean"}],
)  # fmt: skip


@pytest.mark.parametrize("schema", HONOURED)
def test_what_is_generated_is_what_the_schema_describes(schema):
    made, kind = matcher(schema), jsonschema.Draft202012Validator
    validator = kind(schema, format_checker=kind.FORMAT_CHECKER)
    texts = [text for seed in range(25) if (text := sampled(made.deep_copy(), random.Random(seed)))]
    for text in texts:
        validator.validate(json.loads(text))
    assert len(texts) > 3 or schema.get("multipleOf") == 9999  # longer than what is drawn


REFUSED = {
    "minimum above int64": ({"type": "integer", "minimum": 10**19}, "#/minimum"),
    "maximum above int64": ({"type": "integer", "minimum": 0, "maximum": 2**64}, "#/maximum"),
    "both above int64": ({"type": "integer", "minimum": 10**19, "maximum": 2 * 10**19}, "#/minimum"),
    "minimum below int64": ({"type": "integer", "minimum": -_INT64, "maximum": -_INT64 + 2}, "#/minimum"),
    "between doubles": ({"type": "integer", "exclusiveMinimum": 2**53 + 1}, "#/exclusiveMinimum"),
    "large number": ({"type": "number", "maximum": -1e300}, "#/maximum"),
    "tiny number": ({"type": "number", "exclusiveMaximum": 1e-300}, "#/exclusiveMaximum"),
    "no finite bound": ({"type": "number", "maximum": float("inf")}, "#/maximum"),
    "multipleOf of many digits": ({"type": "integer", "multipleOf": 86_400}, "#/multipleOf"),
    "multipleOf of many decimals": ({"type": "number", "multipleOf": 0.123456789}, "#/multipleOf"),
    "multipleOf 0": ({"type": "number", "multipleOf": 0}, "#/multipleOf"),
    "multipleOf below 0": ({"type": "integer", "multipleOf": -3}, "#/multipleOf"),
    "minLength": ({"type": "string", "minLength": MAX_LENGTH + 1}, "#/minLength"),
    "maxLength": ({"type": "string", "maxLength": 10**30}, "#/maxLength"),
    "format": ({"type": ["string", "null"], "format": "iri"}, "#/format"),
    "looking ahead": ({"type": "string", "pattern": "^(?!a)"}, "#/pattern"),
    "looking behind": ({"type": "string", "pattern": "(?<=a)b"}, "#/pattern"),
    "looking back": ({"type": "string", "pattern": r"(a)\1"}, "#/pattern"),
    "word's end": ({"type": "object", "patternProperties": {r"a\b": {}}}, "#/patternProperties"),
    "uniqueItems": ({"type": "array", "uniqueItems": True}, "#/uniqueItems"),
    "contains": ({"type": "array", "contains": {"const": 1}, "minContains": 0}, "#/contains"),
    "unevaluatedItems": ({"type": "array", "unevaluatedItems": False}, "#/unevaluatedItems"),
    "unevaluatedProperties": ({"type": "object", "unevaluatedProperties": False}, "#/unevaluatedProperties"),
    "propertyNames": ({"type": "object", "propertyNames": {"maxLength": 3}}, "#/propertyNames"),
    "dependentRequired": ({"type": "object", "dependentRequired": {"a": ["b"]}}, "#/dependentRequired"),
    "dependentSchemas": ({"type": "object", "dependentSchemas": {"a": {}}}, "#/dependentSchemas"),
    "dependencies": ({"type": "object", "dependencies": {"a": ["b"]}}, "#/dependencies"),
    "minProperties": ({"type": "object", "minProperties": 2}, "#/minProperties"),
    "not": ({"type": "integer", "not": {"const": 3}}, "#/not"),
    "if": ({"if": {"type": "integer"}, "then": {"minimum": 3}}, "#/if"),
    "dynamic": ({"$dynamicRef": "#x"}, "#/$dynamicRef"),
    "large const": ({"const": {"a": [2**53 + 1]}}, "#/const"),
    "large enum": ({"enum": [1, -_INT64]}, "#/enum"),
    "deep": ({"type": "object", "properties": {"a": {"items": {"anyOf": [{}, {"not": {}}]}}}},
             "#/properties/a/items/anyOf/1/not"),
    "of a reference": ({"$ref": "#/$defs/a", "$defs": {"a": {"uniqueItems": True}}}, "#/$defs/a/uniqueItems"),
    "no end": ({"$ref": "#/$defs/n", "$defs": {"n": {**NODE, "properties": {"next": {"$ref": "#/$defs/n"}}}}}, "#"),
    "no end in items": ({"type": "array", "minItems": 1, "items": {"$ref": "#"}}, "#"),
    "of itself": ({"$ref": "#"}, "#"),
    "nothing": ({"type": "object", "required": ["a"], "additionalProperties": False}, "#"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_enforced_is_refused_by_name(name):
    schema, place = REFUSED[name]
    with pytest.raises(RequestError) as caught:
        constraints.of_json(schema, "response_format.json_schema.schema")
    assert caught.value.message.startswith(f"response_format.json_schema.schema: {place} ")
    assert caught.value.param == "response_format.json_schema.schema"


@pytest.mark.parametrize("name", [name for name in REFUSED if REFUSED[name][1] != "#"])
def test_what_cannot_be_enforced_is_passed_over_where_it_need_not_be(name):
    found = enforceable(REFUSED[name][0], "x", is_strict=False)
    assert enforceable(found, "x", is_strict=True) == found
    assert sampled(matcher(REFUSED[name][0], is_strict=False), random.Random(1), 4000) is not None


WORDS = (
    "type", "enum", "const", "properties", "required", "additionalProperties", "items", "prefixItems", "minItems",
    "allOf", "anyOf", "oneOf", "not", "if", "then", "$ref", "$defs", "minimum", "exclusiveMaximum", "multipleOf",
    "minLength",
    "pattern", "patternProperties", "format", "propertyNames", "minProperties", "uniqueItems", "contains",
    "maxContains",
)  # fmt: skip
ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from([0, -1, 2.0, 1e300, 10**400, "object", "array", "string", "#", "#/$defs/a"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*WORDS, "a"]), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=400, deadline=None)
@given(schema=st.dictionaries(st.sampled_from(WORDS), ANYTHING, max_size=6), is_strict=st.booleans())
def test_whatever_is_sent_as_a_schema_is_taken_or_refused(schema, is_strict):
    with contextlib.suppress(RequestError):
        constraints.of_json(schema, "x", is_strict=is_strict).text()


def test_names_of_properties_are_no_keywords():
    names = ("not", "if", "uniqueItems", "minimum", "contains", "format", "pattern", "const")
    schema = {"type": "object", "properties": {name: {"type": "null"} for name in names}, "additionalProperties": False}
    assert enforceable(schema, "x", is_strict=True) == schema
    assert accepts({**schema, "required": list(names)}, json.dumps(dict.fromkeys(names)))


TEXTS = [r'"\u00e9"', r'"\u00E9"', '"é"', r'"\ud83d\ude00"', r'"\u0041"', r'"\u001f"', r'"\n"']


@pytest.mark.parametrize("schema", [{"type": "string"}, {"type": "string", "maxLength": 1}, {}])
def test_characters_may_be_written_by_their_numbers(schema):
    for text in TEXTS:
        assert accepts(schema, text)
        assert accepts({"type": "object"}, f"{{{text}: {text}}}")
    assert not accepts(schema, r'"\ud83d"')


@pytest.mark.parametrize("schema", [{"type": "string", "pattern": "^[^a]*$"}, {"type": "string", "pattern": "^.*$"}])
def test_no_number_becomes_that_of_a_control_character(schema):
    """Where a text has a pattern, no character is written by its number, so none that begins goes wrong."""
    made = matcher(schema)
    made.consume_tokens(list(b'"\\'))
    allowed = np.unpackbits(np.frombuffer(made.compute_bitmask(), np.uint8), bitorder="little").nonzero()[0]
    assert ord("u") not in allowed


def test_a_name_has_one_spelling_where_it_says_what_may_follow():
    schema = {"type": "object", "properties": {"a": {"type": "null"}}}
    assert accepts(schema, '{"a":null,"b":1}')
    assert not accepts(schema, r'{"\u0061":1}')
    assert accepts({"const": "\x01"}, r'"\u0001"')


def test_a_long_text_that_is_counted_comes_to_its_end():
    for schema, begin in (({"type": "string", "maxLength": MAX_LENGTH}, b'"'), ({}, b'["')):
        made = matcher(schema)
        made.consume_tokens(list(begin))
        for number in range(MAX_LENGTH):
            made.compute_bitmask()
            made.consume_token(b"ab\t"[number % 2])
            assert not made.is_error(), made.get_error()
        made.compute_bitmask()
        assert not made.validate_tokens([ord("a")])


@pytest.mark.parametrize(
    "text", ["[" * 17, "6" * 21, "0." + "6" * 21, "1e100", "[1,  ", '{"a":\n' + " " * 21, '"' + "a" * (MAX_LENGTH + 1)]
)
def test_json_that_no_schema_describes_ends(text):
    """Each thing that small models repeat for ever."""
    assert matcher({}).validate_tokens(list(text.encode())) < len(text)


def test_json_that_no_schema_describes_is_json():
    for text in (
        '{"a": [1, 2.5e-7, {"b": null}], "c": "\\/"}',
        "[]",
        "[ ]",
        "true",
        '{\n  "a": [\n    -1\n  ]\n}',
        '""',
    ):
        assert accepts({}, text)
        assert accepts({"type": "object", "title": "x"}, text) is text.startswith("{")
