"""Structured output: which tokens may come next under a JSON schema, an expression, a grammar.

llguidance compiles and walks the grammars: its masks cost about as much as a sampled token's
other work on a CPU, and it needs no second tokenizer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from serve_app.errors import InvalidRequest
from serve_app.protocol import Structure

# JSON without free spaces: a model that likes them could go on with them for ever.
COMPACT: Any = {"whitespace_flexible": False}


@dataclass(frozen=True, slots=True)
class Grammar:
    """A compiled structure; each completion walks it by a matcher of its own.

    Args:
        tokens: llguidance's view of the tokenizer.
        text: llguidance's own form of the grammar.
    """

    tokens: Any
    text: str

    def matcher(self) -> Matcher:
        """Return a walk from the beginning."""
        import llguidance  # noqa: PLC0415 (only those who ask for structure pay for it)

        return Matcher(llguidance.LLMatcher(self.tokens, self.text))


class Matcher:
    """One completion's walk through its grammar."""

    def __init__(self, walk: Any) -> None:
        self._walk = walk

    def take(self, tokens: list[int]) -> None:
        """Go on with sampled tokens.

        Raises:
            ValueError: one of them was not allowed; the mask was not applied.
        """
        if tokens and not self._walk.consume_tokens(tokens):
            # The first line says why; the others are the walk's state, with the client's text.
            why = self._walk.get_error().partition("\n")[0]
            raise ValueError(f"a token outside the grammar: {why}")

    def allowed(self, vocabulary: int) -> torch.Tensor:
        """Return which tokens may come next; bool, (vocabulary,), at least one is true."""
        raw = torch.frombuffer(bytearray(self._walk.compute_bitmask()), dtype=torch.uint8)
        bits = (raw[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        flat = bits.flatten().bool()
        mask = torch.zeros(vocabulary, dtype=torch.bool)
        mask[: min(vocabulary, len(flat))] = flat[:vocabulary]
        return mask


class GrammarCompiler:
    """Compiles structures for one tokenizer.

    Args:
        tokenizer: transformers' tokenizer.
        vocab_size: rows of the embedding.
        eos_token_ids: any of them may end a completion that is whole.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos = sorted(eos_token_ids)

    def compile(self, structure: Structure) -> Grammar:
        """Compile a structure; takes milliseconds, for large schemas more.

        Raises:
            InvalidRequest: it is malformed, or asks for what cannot be enforced.
        """
        import llguidance  # noqa: PLC0415

        try:
            text = _translate(structure)
            fault = llguidance.LLMatcher.validate_grammar(text, self._tokens)
        except (ValueError, TypeError) as error:
            fault = str(error)
        if fault:
            raise InvalidRequest(
                f"The structure cannot be enforced: {fault.splitlines()[0]}", param="structure"
            )
        return Grammar(self._tokens, text)

    @cached_property
    def _tokens(self) -> Any:
        import llguidance.hf  # noqa: PLC0415

        if not self._eos:
            raise InvalidRequest(
                "This model has no end-of-sequence token, so nothing could end.", param="structure"
            )
        return llguidance.hf.from_tokenizer(
            self._tokenizer, n_vocab=self._vocab_size, eos_token=self._eos
        )


def _translate(structure: Structure) -> str:
    from llguidance import LLMatcher  # noqa: PLC0415

    match structure.kind:
        case "json_object":
            return str(LLMatcher.grammar_from_json_schema({"type": "object"}, COMPACT))
        case "json_schema":
            return str(LLMatcher.grammar_from_json_schema(structure.definition, COMPACT))
        case "regex":
            return str(LLMatcher.grammar_from_regex(structure.definition))
        case "choice":
            choices = json.loads(structure.definition)
            if not choices:
                raise ValueError("there is nothing to choose from")
            # As one terminal thousands are no more than one: a rule would follow each by itself.
            texts = " | ".join(map(json.dumps, choices))
            return str(LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {texts}"))
        case "grammar":
            return str(LLMatcher.grammar_from_lark(structure.definition))
