"""A structure to a constraint of vLLM's, so that the text is the one of the builtin engine.

vLLM's backend `guidance` is the same library, llguidance. A JSON schema goes there as our own
compiler prepared it, with the separators in it; expressions, choices and Lark grammars as they are.
"""

from __future__ import annotations

import json
from functools import lru_cache

from vllm.sampling_params import StructuredOutputsParams

from serve_app.engine.grammar.compile import translate
from serve_app.protocol import Structure

KEPT = 256  # of the latest structures


def constraint_of(structure: Structure) -> StructuredOutputsParams:
    """Return the constraint; only for a structure that a worker of the pool has compiled.

    Raises:
        ValueError: it cannot be translated.
    """
    match structure.kind:
        case "json_object" | "json_schema":
            return StructuredOutputsParams(json=prepared(structure))
        case "regex":
            return StructuredOutputsParams(regex=structure.definition)
        case "choice":
            return StructuredOutputsParams(choice=json.loads(structure.definition))
        case "grammar":
            return StructuredOutputsParams(grammar=structure.definition)


@lru_cache(maxsize=KEPT)
def prepared(structure: Structure) -> str:
    """Return a JSON schema with all of our rules in it, as text.

    Raises:
        ValueError: it cannot be translated.
    """
    made = json.loads(translate(structure.kind, structure.definition, strict=structure.strict))
    (grammar,) = made["grammars"]
    return json.dumps(grammar["json_schema"])
