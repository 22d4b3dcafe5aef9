"""A JSON schema as its author means it, ready for llguidance.

Three things are done to a schema before it is compiled:

* Objects that list their properties and say nothing of others are closed, as OpenAI and vLLM do
  it: a model that may add keys adds them until the limit of tokens.
* References (`$ref` to a pointer, an `$id` or an `$anchor`) become pointers from the root, so a
  schema can stand inside another one, as a tool's does.
* Without `strict`, what cannot be enforced is left to the reader of the answer: a pattern with
  look-around, a divisor too large for an automaton. With it, that is an error which names the
  place. `protocol.SUBSCHEMA` on a part of the schema sets both for what is inside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin

from serve_app.engine.grammar.limits import MAX_MULTIPLE, is_too_large_a_multiple
from serve_app.engine.grammar.references import (
    MANY,
    NAMED,
    ONE,
    SchemaFault,
    base_of,
    escaped,
    identifiers,
    quoted,
)
from serve_app.protocol import SUBSCHEMA

_OPENING = frozenset({"additionalProperties", "patternProperties", "unevaluatedProperties"})
_IDENTIFYING = frozenset({"$id", "id", "$anchor", "$dynamicAnchor", "$schema"})
# What llguidance 1.9 does not enforce and, in its lenient mode, leaves out.
_NOT_ENFORCED = frozenset({
    "propertyNames", "uniqueItems", "not", "unevaluatedProperties", "unevaluatedItems",
    "dependentRequired", "dependentSchemas", "dependencies", "if", "then", "else", "contains",
    "minContains", "maxContains", "$dynamicRef", "$recursiveRef",
})  # fmt: skip
# Values at which one of those allows everything.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "propertyNames": (True, {}, {"type": "string"}),
    "uniqueItems": (False,),
    "not": (False,),
    "unevaluatedProperties": (True, {}),
    "unevaluatedItems": (True, {}),
    "dependentRequired": ({},),
    "dependencies": ({},),
    "dependentSchemas": ({},),
}
_NOT_REGULAR = "it is not a regular expression that can be enforced"


@dataclass(frozen=True, slots=True)
class _Place:
    """Where in a schema we are.

    Args:
        base: the URI that relative references are resolved against.
        name: the place in a client's words.
        strict: whether what cannot be enforced is an error.
        shared: another schema describes the same object, so this one may not close it.
    """

    base: str
    name: str
    strict: bool
    shared: bool = False

    def inside(self, step: str, *, shared: bool = False) -> _Place:
        return replace(self, name=f"{self.name}.{step}".lstrip("."), shared=shared)


def prepare(
    schema: dict[str, Any], *, strict: bool, is_regular: Callable[[str], bool]
) -> dict[str, Any]:
    """Return a schema that llguidance compiles as its author means it; see the module.

    Args:
        schema: the client's.
        strict: whether what cannot be enforced is an error, where no mark says otherwise.
        is_regular: whether a pattern can be enforced.

    Raises:
        SchemaFault: nested too deeply, or, under `strict`, something in it cannot be enforced or a
            reference leads nowhere.
    """
    resources: dict[str, str] = {}
    for uri, pointer in identifiers(schema, "", "#", 0):
        resources.setdefault(uri, pointer)
    return _Preparation(schema, resources, is_regular).run(strict=strict)


class _Preparation:
    """One schema on its way; see `prepare`."""

    def __init__(
        self,
        root: dict[str, Any],
        resources: dict[str, str],
        is_regular: Callable[[str], bool],
    ) -> None:
        self._root = root
        self._resources = resources
        self._is_regular = is_regular
        # Definitions that an object shares with others stand here once more, left open.
        self._open: dict[str, Any] = {}

    def run(self, *, strict: bool) -> dict[str, Any]:
        prepared: dict[str, Any] = self._node(self._root, _Place("", "", strict), "#")
        if self._open:
            prepared["$defs"] = {**prepared.get("$defs", {}), **self._open}
        return prepared

    def _node(self, node: Any, place: _Place, pointer: str) -> Any:
        if not isinstance(node, dict):
            return node
        mark = node.get(SUBSCHEMA)
        if isinstance(mark, dict):
            place = replace(
                place,
                strict=bool(mark.get("strict", place.strict)),
                name=str(mark.get("name", place.name)),
            )
        place = replace(place, base=base_of(node, place.base))
        out = {
            keyword: self._value(node, keyword, place, pointer)
            for keyword, value in node.items()
            if self._is_kept(keyword, value, place)
        }
        self._close(node, out, place)
        return out

    def _value(self, node: dict[str, Any], keyword: str, place: _Place, pointer: str) -> Any:
        value = node[keyword]
        if keyword == "$ref" and isinstance(value, str):
            return self._reference(value, place, shared=place.shared or "properties" in node)
        if keyword in NAMED and isinstance(value, dict):
            return {
                name: self._node(
                    child,
                    place.inside(f"{keyword}.{name}"),
                    f"{pointer}/{keyword}/{escaped(name)}",
                )
                for name, child in value.items()
                if self._is_kept_name(keyword, name, place)
            }
        if keyword in MANY and isinstance(value, list):
            shared = place.shared or _describe_one_object(node, keyword)
            return [
                self._node(
                    child,
                    place.inside(f"{keyword}[{index}]", shared=shared),
                    f"{pointer}/{keyword}/{index}",
                )
                for index, child in enumerate(value)
            ]
        if keyword in ONE:
            return self._node(value, place.inside(keyword), f"{pointer}/{keyword}")
        return value

    def _is_kept(self, keyword: str, value: Any, place: _Place) -> bool:
        """Return whether a keyword goes to the compiler.

        Raises:
            SchemaFault: it cannot be enforced, and has to be.
        """
        if keyword == SUBSCHEMA or (keyword in _IDENTIFYING and isinstance(value, str)):
            return False
        if any(value is neutral or value == neutral for neutral in _NEUTRAL.get(keyword, ())):
            return False
        why = self._obstacle(keyword, value, place)
        return why is None or self._leave(place, keyword, why)

    def _obstacle(self, keyword: str, value: Any, place: _Place) -> str | None:
        """Return why a keyword cannot be enforced; None if it can."""
        if keyword == "$ref" and isinstance(value, str) and self._found(value, place) is None:
            return f"{value[:200]!r} leads to no part of this schema"
        if keyword == "pattern" and isinstance(value, str) and not self._is_regular(value):
            return _NOT_REGULAR
        if keyword == "multipleOf" and is_too_large_a_multiple(value):
            return f"above the limit of {MAX_MULTIPLE:,}"
        return "this keyword is not enforced here" if keyword in _NOT_ENFORCED else None

    def _is_kept_name(self, keyword: str, name: str, place: _Place) -> bool:
        if keyword != "patternProperties" or self._is_regular(name):
            return True
        return self._leave(place, f"{keyword}.{name[:64]}", _NOT_REGULAR)

    def _leave(self, place: _Place, keyword: str, why: str) -> bool:
        if place.strict:
            raise SchemaFault(f"`{place.inside(keyword).name}`: {why}")
        return False

    def _close(self, node: dict[str, Any], out: dict[str, Any], place: _Place) -> None:
        """Forbid other keys in an object that lists some and says nothing of others."""
        if place.shared or not {"properties", "allOf"} & node.keys():
            return
        names = self._listed(node, place, frozenset())
        if names is None:
            return
        unlisted = _required(node) - names  # may be anything, but have to be there
        if "allOf" in node or "$ref" in node:
            # `additionalProperties` looks at its own neighbours only, so all are listed again.
            closing = {
                "properties": dict.fromkeys(sorted(names | unlisted), True),
                "additionalProperties": False,
            }
            out["allOf"] = [*out.get("allOf", ()), closing]
        else:
            out["additionalProperties"] = False
            if unlisted:
                out["properties"] = {**out["properties"], **dict.fromkeys(sorted(unlisted), True)}

    def _listed(self, node: Any, place: _Place, seen: frozenset[str]) -> set[str] | None:
        """Return the keys that a schema and those beside it list; None leaves the object open."""
        if not isinstance(node, dict) or _OPENING & node.keys():
            return None
        if not all(
            _says_nothing_of_keys(member)
            for keyword in ("anyOf", "oneOf")
            for member in _members(node, keyword)
        ):
            return None
        own = node.get("properties")
        lists = [set(own)] if isinstance(own, dict) else []
        beside = [m for m in _members(node, "allOf") if not _says_nothing_of_keys(m)]
        if isinstance(reference := node.get("$ref"), str):
            found = self._found(reference, place)
            if found is None or found[0] in seen:
                return None
            seen |= {found[0]}
            beside.append(found[1])
        for member in beside:
            if (listed := self._listed(member, place, seen)) is None:
                return None
            lists.append(listed)
        return set().union(*lists) if lists else None

    def _reference(self, reference: str, place: _Place, *, shared: bool) -> str:
        """Return a reference as a pointer from the root; it is known to lead somewhere."""
        target, node = self._found(reference, place) or ("#", self._root)
        if not shared:
            return quoted(target)
        name = f"open {target}"
        if name not in self._open:
            self._open[name] = True  # it may refer to itself
            self._open[name] = self._node(node, replace(place, shared=True), target)
        return quoted(f"#/$defs/{escaped(name)}")

    def _found(self, reference: str, place: _Place) -> tuple[str, Any] | None:
        """Return what a reference means: the pointer from the root, and the schema there."""
        uri, fragment = urldefrag(urljoin(place.base, reference))
        if fragment and not fragment.startswith("/"):
            pointer = self._resources.get(f"{uri}#{fragment}")
        else:
            start = self._resources.get(uri)
            pointer = None if start is None else start + unquote(fragment)
        return None if pointer is None else self._at(pointer)

    def _at(self, pointer: str) -> tuple[str, Any] | None:
        node: Any = self._root
        for step in pointer.split("/")[1:]:
            name = step.replace("~1", "/").replace("~0", "~")
            if isinstance(node, dict) and name in node:
                node = node[name]
            elif isinstance(node, list) and name.isdecimal() and int(name) < len(node):
                node = node[int(name)]
            else:
                return None
        return pointer, node


def _members(node: dict[str, Any], keyword: str) -> list[Any]:
    members = node.get(keyword)
    return members if isinstance(members, list) else []


def _describe_one_object(node: dict[str, Any], keyword: str) -> bool:
    """Return whether the members of a keyword speak of an object that others speak of, too."""
    beside = {"properties", "allOf", "$ref"} & node.keys() - {keyword}
    several = keyword == "allOf" and len(_members(node, keyword)) > 1
    return keyword in ("allOf", "anyOf", "oneOf") and (several or bool(beside))


def _required(node: dict[str, Any]) -> set[str]:
    """Return the keys that an object must have, by itself and by what stands beside it."""
    wanted = node.get("required")
    names = {n for n in wanted if isinstance(n, str)} if isinstance(wanted, list) else set()
    for keyword in ("allOf", "anyOf", "oneOf"):
        for member in _members(node, keyword):
            names |= _required(member) if isinstance(member, dict) else set()
    return names


def _says_nothing_of_keys(member: Any) -> bool:
    keys = {"properties", "$ref", "allOf", "anyOf", "oneOf"} | _OPENING
    return not isinstance(member, dict) or not keys & member.keys()
