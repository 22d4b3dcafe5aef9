"""Schemas as their authors mean them: closed, resolved, and lenient unless `strict`."""

import json

import pytest
from jsonschema import Draft202012Validator
from llguidance import LLMatcher

from serve_app.engine.grammar.compile import _is_regular, translate
from serve_app.engine.grammar.schema import SchemaFault, prepare
from serve_app.protocol import SUBSCHEMA

STRING = {"type": "string"}


def prepared(schema, *, strict=False):
    return prepare(schema, strict=strict, is_regular=_is_regular)


def test_prepared_closes_an_object_that_lists_its_keys():
    """At every level, in definitions and in lists; what says so itself stays open."""
    schema = {
        "type": "object",
        "properties": {
            "a": {"type": "array", "items": {"properties": {"x": STRING}}},
            "free": {"type": "object"},
            "open": {"properties": {"y": STRING}, "additionalProperties": True},
            "pattern": {"properties": {}, "patternProperties": {"^x": STRING}},
            "none": {"type": "object", "properties": {}},
        },
        "$defs": {"d": {"properties": {"z": STRING}}},
    }
    got = prepared(schema)
    assert got["additionalProperties"] is False
    assert got["properties"]["a"]["items"]["additionalProperties"] is False
    assert got["$defs"]["d"]["additionalProperties"] is False
    assert got["properties"]["none"]["additionalProperties"] is False
    assert got["properties"]["open"]["additionalProperties"] is True
    for name in ("free", "pattern"):
        assert "additionalProperties" not in got["properties"][name]


def test_prepared_does_not_let_parts_of_one_object_close_each_other():
    """The members of allOf list the keys together, also through references; one closes it."""
    schema = {
        "allOf": [{"$ref": "#/$defs/base"}, {"properties": {"b": STRING}}],
        "$defs": {"base": {"properties": {"a": STRING}, "required": ["a"]}},
    }
    got = prepared(schema)
    first, second, closing = got["allOf"]
    twin = first["$ref"].removeprefix("#/$defs/")
    assert "additionalProperties" not in second
    assert closing == {"properties": {"a": True, "b": True}, "additionalProperties": False}
    assert got["$defs"]["base"]["additionalProperties"] is False  # for whoever means it alone
    open_twins = [name for name in got["$defs"] if name != "base"]
    assert len(open_twins) == 1
    assert twin
    assert "additionalProperties" not in got["$defs"][open_twins[0]]


def test_prepared_takes_one_member_of_all_of_as_an_object_of_its_own():
    """As pydantic 1 writes a field with a default."""
    got = prepared(
        {"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"properties": {"x": STRING}}}}
    )
    assert got["allOf"][0] == {"$ref": "#/$defs/a"}
    assert got["$defs"]["a"]["additionalProperties"] is False


def test_prepared_leaves_alternatives_beside_properties_open():
    """Keys of a branch would be forbidden by the others' list."""
    schema = {
        "properties": {"kind": STRING},
        "oneOf": [{"properties": {"x": STRING}}, {"properties": {"y": STRING}}],
    }
    got = prepared(schema)
    assert "additionalProperties" not in got
    assert all("additionalProperties" not in branch for branch in got["oneOf"])


def test_prepared_closes_beside_alternatives_that_only_require():
    """`anyOf` of `required` says nothing of further keys."""
    got = prepared(
        {"properties": {"a": STRING}, "anyOf": [{"required": ["a"]}, {"maxProperties": 0}]}
    )
    assert got["additionalProperties"] is False


@pytest.mark.parametrize(
    "beside",
    [
        {"required": ["a", "b"]},
        {"anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
        {"allOf": [{"required": ["b"]}]},
    ],
    ids=lambda beside: next(iter(beside)),
)
def test_prepared_leaves_room_for_every_key_that_is_required(beside):
    """A key that is required and not listed may be anything; closed without it nothing is valid."""
    schema = {"type": "object", "properties": {"a": STRING}, **beside}
    got = prepared(schema)
    valid = Draft202012Validator(got).is_valid
    assert valid({"a": "x", "b": 1})
    assert not valid({"a": "x", "b": 1, "c": 1})
    assert not LLMatcher.validate_grammar(
        translate("json_schema", json.dumps(schema), strict=False)
    )


@pytest.mark.parametrize(
    ("root", "reference"),
    [
        ({}, "#/$defs/y"),
        ({"$id": "https://x.test/root.json"}, "#/$defs/y"),
        ({"$id": "https://x.test/root.json"}, "https://x.test/root.json#/$defs/y"),
        ({"$id": "https://x.test/root.json"}, "root.json#/$defs/y"),
        ({"$id": "https://x.test/root.json"}, "named.json"),
        ({"$id": "https://x.test/root.json"}, "https://x.test/named.json"),
        ({}, "#anchored"),
        ({}, "#/$defs/%79"),
    ],
)
def test_prepared_makes_references_pointers(root, reference):
    """Whatever a schema calls a part of itself."""
    schema = {
        **root,
        "$schema": "https://unknown.test/dialect#",
        "properties": {"a": {"$ref": reference}},
        "$defs": {"y": {"$id": "named.json", "$anchor": "anchored", **STRING}},
    }
    if not root:
        del schema["$defs"]["y"]["$id"]
    got = prepared(schema)
    assert got["properties"]["a"] == {"$ref": "#/$defs/y"}
    assert "$id" not in json.dumps(got)
    assert "$schema" not in got


def test_prepared_takes_a_subschema_as_the_root_of_its_references():
    """Two tools with definitions of one name, and even of one `$id`, do not meet."""
    mark = {"id": "https://x.test/tool"}
    tool = {
        "properties": {"a": {"$ref": "#/$defs/y"}, "again": {"$ref": "#"}},
        "$defs": {"y": STRING},
    }
    got = prepared(
        {
            "$defs": {
                "one": {"$id": "https://part.test/1", SUBSCHEMA: mark, **tool},
                "two": {"$id": "https://part.test/2", SUBSCHEMA: mark, **tool},
                "three": {"properties": {"a": {"$ref": "https://x.test/tool#/$defs/y"}}},
            },
            "anyOf": [{"$ref": "#/$defs/one"}, {"$ref": "#/$defs/two"}],
        }
    )
    for name in ("one", "two"):
        properties = got["$defs"][name]["properties"]
        assert properties["a"] == {"$ref": f"#/$defs/{name}/$defs/y"}
        assert properties["again"] == {"$ref": f"#/$defs/{name}"}
    assert got["$defs"]["three"]["properties"]["a"] == {"$ref": "#/$defs/one/$defs/y"}
    assert SUBSCHEMA not in json.dumps(got)


NOT_ENFORCED = [
    {"pattern": r"^(?!\.)a$"},
    {"pattern": r"^(a)\1$"},
    {"multipleOf": 99_999_989},
    {"propertyNames": {"pattern": "^a"}},
    {"uniqueItems": True},
    {"not": {"type": "null"}},
    {"not": {}},
    {"if": {"properties": {"a": {"const": 1}}}, "then": {"required": ["b"]}},
    {"contains": STRING},
    {"dependentRequired": {"a": ["b"]}},
    {"unevaluatedProperties": False},
    {"patternProperties": {"^(?=x)": STRING}},
]


@pytest.mark.parametrize("extra", NOT_ENFORCED, ids=lambda extra: next(iter(extra)))
def test_prepared_leaves_to_the_reader_what_cannot_be_enforced(extra):
    """Left to the reader; with `strict` refused with the place."""
    schema = {"type": "object", "properties": {"deep": {"title": "t", **extra}}}
    keyword = next(iter(extra))
    left = prepared(schema)["properties"]["deep"]
    assert not left.get(keyword)
    assert left["title"] == "t"
    with pytest.raises(SchemaFault, match=r"`properties\.deep\." + keyword.replace("$", r"\$")):
        prepared(schema, strict=True)


def test_prepared_refuses_for_one_strict_tool_without_touching_another():
    """The error names the tool; the lenient one beside it would compile."""
    bad = {"properties": {"to": {"type": "string", "pattern": "^(?!x)"}}}
    mark = {"strict": True, "name": "tools[1].function.parameters"}
    schema = {"$defs": {"a": {SUBSCHEMA: {}, **bad}, "b": {SUBSCHEMA: mark, **bad}}}
    with pytest.raises(
        SchemaFault, match=r"`tools\[1\]\.function\.parameters\.properties\.to\.pattern`"
    ):
        prepared(schema)
    mark["strict"] = False
    assert "pattern" not in json.dumps(prepared(schema))


@pytest.mark.parametrize(
    "extra",
    [
        {"propertyNames": {"type": "string"}},
        {"uniqueItems": False},
        {"dependentRequired": {}},
        {"unevaluatedProperties": True},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_prepared_takes_with_strict_what_says_nothing(extra):
    """Records of Zod, and defaults that a generator writes out."""
    prepared({"type": "object", **extra}, strict=True)


@pytest.mark.parametrize(
    "reference",
    ["#/$defs/none", "#none", "https://elsewhere.test/schema", "other.json", "#/$defs/y/0"],
)
def test_prepared_follows_no_reference_that_leads_nowhere(reference):
    """Nothing is fetched; it is left out, or, with `strict`, named with its place."""
    schema = {"properties": {"a": {"title": "t", "$ref": reference}}, "$defs": {"y": STRING}}
    assert prepared(schema)["properties"]["a"] == {"title": "t"}
    with pytest.raises(SchemaFault, match=r"`properties\.a\.\$ref`.*leads to no part"):
        prepared(schema, strict=True)


def test_prepared_refuses_a_schema_that_is_too_deep():
    """Before Python's own limit."""
    schema: dict = {}
    for _ in range(400):
        schema = {"type": "array", "items": schema}
    with pytest.raises(SchemaFault, match="nested deeper"):
        prepared(schema)


def test_prepared_takes_a_schema_that_refers_to_itself():
    """Trees and lists are data's usual shapes."""
    tree = {
        "$defs": {"node": {"properties": {"kids": {"items": {"$ref": "#/$defs/node"}}}}},
        "allOf": [{"$ref": "#/$defs/node"}, {"properties": {"name": STRING}}],
    }
    got = prepared(tree)
    assert got["allOf"][-1]["additionalProperties"] is False


def test_prepared_takes_no_value_for_a_schema():
    """What stands in enum, const, default and examples is not looked into."""
    value = {"properties": {"a": 1}, "$ref": "#/nowhere", "pattern": "(?!x)"}
    schema = {"enum": [value], "const": value, "default": value, "examples": [value]}
    assert prepared(schema, strict=True) == schema
