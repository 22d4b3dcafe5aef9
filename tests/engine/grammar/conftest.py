"""A pool over the demo model's tokenizer, and a walk through a grammar."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from serve_app.engine.grammar.matcher import Worker, wait
from serve_app.engine.grammar.pool import GrammarPool

EOS = 2


@dataclass
class Walk:
    """What a random walk came to: its text, or the fault that ended it."""

    text: str
    complete: bool
    fault: str | None
    slowest_s: float = 0.0


@dataclass
class Demo:
    """The demo model's tokenizer."""

    json: str
    tokenizer: Tokenizer
    vocab_size: int

    def pool(self, slots: int = 16, **settings) -> GrammarPool:
        """Return a pool of its own."""
        return GrammarPool(
            lambda: self.json,
            vocab_size=self.vocab_size,
            eos_token_ids=frozenset({EOS}),
            slots=slots,
            **settings,
        )

    def walk(self, worker: Worker, *, seed: int = 0, most: int = 300) -> Walk:
        """Draw tokens that the masks allow, an end only where nothing else may come."""
        rng = random.Random(seed)
        (matcher,) = worker.open()
        ids: list[int] = []
        try:
            while len(ids) < most:
                wait([matcher], 20)
                assert not matcher.pending
                if matcher.fault is not None:
                    return Walk(self.decode(ids), complete=False, fault=matcher.fault)
                allowed = np.flatnonzero(
                    np.unpackbits(matcher.mask, bitorder="little", count=self.vocab_size)
                ).tolist()
                assert allowed, "a mask that allows nothing has to be a fault"
                others = [token for token in allowed if token != EOS]
                if not others:
                    return Walk(self.decode(ids), complete=True, fault=None)
                ids.append(rng.choice(others))
                matcher.advance(ids[-1])
        finally:
            matcher.close()
        return Walk(self.decode(ids), complete=False, fault=None)

    def accepts(self, worker: Worker, text: str) -> bool:
        """Return whether a text is complete under a grammar."""
        (matcher,) = worker.open()
        try:
            for token in (*self.tokenizer.encode(text).ids, EOS):
                wait([matcher], 20)
                bits = np.unpackbits(matcher.mask, bitorder="little", count=self.vocab_size)
                if matcher.fault is not None or not bits[token]:
                    return False
                if token != EOS:
                    matcher.advance(token)
            return True
        finally:
            matcher.close()

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))


@pytest.fixture(scope="session")
def demo(demo_model_dir: Path) -> Demo:
    """The demo model's tokenizer."""
    text = (demo_model_dir / "tokenizer.json").read_text()
    tokenizer = Tokenizer.from_str(text)
    return Demo(text, tokenizer, tokenizer.get_vocab_size())


@pytest.fixture(scope="module")
def pool(demo: Demo) -> Iterator[GrammarPool]:
    """One pool for the tests that only ask."""
    with closing(demo.pool()) as running:
        yield running
