"""Renders chat templates under a limit: no conversation can make one run without end.

A chat template is a program of the model's author that runs over a client's data. transformers
runs it in Jinja's sandbox, which confines what it can reach but not how long it works: a
template that looks at each message once for each message needs hours for a body of 2 MB, and
`'x' * n` takes all memory. Here every loop, call and output is metered, against the thread's
own CPU time, and values have a largest size, so no single operation is long either.

Filters, globals and tags are those of transformers, so the text is the same to the byte.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

from jinja2 import Environment, TemplateError, TemplateSyntaxError, nodes, pass_context
from jinja2.nodes import EvalContext
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer
from transformers.utils import chat_template_utils

RENDER_CPU_S = 1.0  # a prompt of 100,000 tokens takes a tenth of it
MAX_CHARS = 2**24  # of the rendered text, and of any string on the way
MAX_ITEMS = 2**20  # of any list on the way
TICKS_A_LOOK = 64  # the clock costs more than a step of a loop
CONTINUE = "CONTINUE_FINAL_MESSAGE_TAG "  # ends in a space, so that trimming shows
MAX_BITS = 4096  # of any number
# Filters and methods of strings that repeat something as often as an argument says, and those that
# write all of a value as text.
_WIDENING = frozenset({
    "batch", "center", "expandtabs", "indent", "ljust", "rjust", "slice", "tojson", "wordwrap",
    "zfill",
})  # fmt: skip
_WRITING = frozenset({
    "format", "format_map", "join", "pprint", "string", "tojson", "urlencode", "xmlattr",
})  # fmt: skip
_WIDE = re.compile(r"[%:][^%{}\s]{0,8}?\d{7}|%[^%\s]{0,8}?\*|\{[^{}]*\{")  # a width, given or taken
# What a program over unknown data raises; the engine must not see any of them.
FAULTS = (
    TemplateError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)


class TemplateRefusal(Exception):
    """The template cannot render this conversation; the message says why, for the client."""


class TemplateLimit(TemplateRefusal):
    """Rendering this conversation would take too long, or too much memory."""


class _Meter:
    """The work of one rendering."""

    def __init__(self, cpu_s: float) -> None:
        self._deadline = time.thread_time() + cpu_s
        self._ticks = 0

    def tick(self) -> None:
        """Count one step.

        Raises:
            TemplateLimit: the time is used up.
        """
        self._ticks += 1
        if self._ticks % TICKS_A_LOOK == 0 and time.thread_time() > self._deadline:
            raise TemplateLimit("the model's chat template takes too long for this conversation")


_METER: ContextVar[_Meter] = ContextVar("meter")


def _bounded(value: Any) -> Any:
    """Return a value that is not too large, and count it."""
    _METER.get().tick()
    if isinstance(value, str | bytes):
        _require(len(value), MAX_CHARS)
    elif isinstance(value, Sized):
        _require(len(value), MAX_ITEMS)
    return value


def _require(size: int, limit: int) -> None:
    if size > limit:
        raise TemplateLimit("the model's chat template makes too large a text of this conversation")


def _weigh(value: object, room: int = MAX_CHARS) -> int:
    """Return what is left of `room` when a value is written as text: it may hold one many times."""
    left = room - (len(value) if isinstance(value, str) else 1)
    if left < 0:
        _require(MAX_CHARS + 1, MAX_CHARS)
    if isinstance(value, Mapping):
        for key, item in value.items():
            left = _weigh(item, _weigh(key, left))
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            left = _weigh(item, left)
    return left


@pass_context
def _finalize(_context: object, value: object) -> object:
    """Look at what `{{ }}` is about to write."""
    if not isinstance(value, str):
        _weigh(value)
    return value


@pass_context  # this also keeps the compiler from calling it ahead of time
def _steps(_context: object, items: Iterable[Any]) -> Iterator[Any]:
    """Iterate as a loop of the template does, counted."""
    tick = _METER.get().tick
    for item in items:
        tick()
        yield item


@pass_context
def _joined(_context: object, parts: Sequence[object]) -> str:
    """Return what `~` makes of its operands."""
    _weigh(parts)
    return "".join(map(str, parts))


def _concat(parts: Iterable[str]) -> str:
    texts = list(parts)
    _require(sum(map(len, texts)), MAX_CHARS)
    return "".join(texts)


class _Metering(NodeTransformer):
    """Sends loops and concatenations through the meter."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - Jinja's name
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "_steps", [], [], None, None)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return nodes.Filter(nodes.List(node.nodes), "_joined", [], [], None, None)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox with a meter at loops, calls, operators, and wherever text is joined."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    concat = staticmethod(_concat)

    def _generate(self, source: nodes.Template, *args: Any, **options: Any) -> str:
        metered = _Metering().visit(source)
        metered.set_environment(self)
        return super()._generate(metered, *args, **options)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a macro, a method or a global."""
        _METER.get().tick()
        method = getattr(obj, "__wrapped__", obj)  # the sandbox wraps `format`
        if isinstance(owner := getattr(method, "__self__", None), str):
            _check_growth(method.__name__, owner, (*args, *kwargs.values()))
        return _bounded(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Do an operator whose result may be much larger than its operands."""
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * max(1, abs(right) if operator == "**" else 1)
            _require(bits + right.bit_length(), MAX_BITS)
        elif operator == "*" and isinstance(left, Sized) != isinstance(right, Sized):
            items, times = (left, right) if isinstance(left, Sized) else (right, left)
            _require(len(items) * max(0, int(times)), MAX_ITEMS)
        elif operator == "%" and isinstance(left, str):
            _check_growth("format", left, (right,))
        return _bounded(super().call_binop(context, operator, left, right))


def _check_growth(name: str, value: object, args: tuple[Any, ...]) -> None:
    """Refuse a filter or a string's method that makes far more of a value than it is given."""
    if name in _WIDENING and any(isinstance(arg, int) and arg > MAX_ITEMS for arg in args):
        raise TemplateLimit("the model's chat template makes too wide a text")
    if name in _WRITING:
        _weigh((value, *args))
    if not isinstance(value, str):
        return
    if name == "replace" and len(args) >= 2:
        _require(len(value) + value.count(args[0]) * len(args[1]), MAX_CHARS)
    elif name == "join" and args and isinstance(args[0], Sized):
        _require(len(value) * len(args[0]), MAX_CHARS)
    elif name in ("format", "format_map") and _WIDE.search(value):
        raise TemplateLimit("the model's chat template makes too wide a text")


def _metered(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter that is counted and bounded; Jinja's own marks on it stay."""

    def bounded(*args: Any, **kwargs: Any) -> Any:
        values = [arg for arg in args if not isinstance(arg, Context | EvalContext | Environment)]
        if values:
            _check_growth(name, values[0], (*values[1:], *kwargs.values()))
        return _bounded(function(*args, **kwargs))

    bounded.__dict__.update(getattr(function, "__dict__", {}))
    return bounded


@lru_cache(maxsize=1)
def _environment() -> _Environment:
    # transformers keeps its environment to itself; a test compares the texts of both.
    theirs = chat_template_utils._compile_jinja_template("").environment
    environment = _Environment(
        trim_blocks=theirs.trim_blocks,
        lstrip_blocks=theirs.lstrip_blocks,
        finalize=_finalize,
        extensions=[type(extension) for extension in theirs.extensions.values()],
    )
    environment.globals |= theirs.globals
    del environment.globals["lipsum"]  # as many words as its argument says
    environment.filters = {name: _metered(name, each) for name, each in theirs.filters.items()}
    environment.filters |= {"_steps": _steps, "_joined": _joined}
    environment.tests = dict(theirs.tests)
    return environment


@lru_cache(maxsize=32)  # of templates, which a trusted client may send with a request
def _compiled(source: str) -> Any:
    return _environment().from_string(source)


def check_template(source: str) -> None:
    """Compile a template.

    Raises:
        TemplateRefusal: it is no template; the message names the line.
    """
    token = _METER.set(_Meter(RENDER_CPU_S))
    try:
        _compiled(source)
    except TemplateSyntaxError as error:
        raise TemplateRefusal(f"line {error.lineno}: {error.message}") from error
    except FAULTS as error:
        raise TemplateRefusal(str(error)) from error
    finally:
        _METER.reset(token)


class Budget:
    """CPU time that several renderings of one request share.

    Args:
        cpu_s: seconds of the calling thread.
    """

    def __init__(self, cpu_s: float = RENDER_CPU_S) -> None:
        self.meter = _Meter(cpu_s)


def render(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
    *,
    continue_final: bool,
    budget: Budget,
) -> str:
    """Render a conversation as transformers' `apply_chat_template` does, within a budget.

    Args:
        source: the template's text.
        messages: OpenAI-shaped; keys whose value is None are left out.
        variables: everything else that the template may read, `tools` included.
        continue_final: end with the last message's own last word.
        budget: of this request.

    Raises:
        TemplateRefusal: the template raises, on purpose or because of what it is given.
        TemplateLimit: it needs more than the budget, or makes too large a text.
    """
    chat = [_shown(message) for message in messages]
    final = ""
    if continue_final:
        final = str(chat[-1].get("content", ""))
        chat[-1]["content"] = final + CONTINUE
    token = _METER.set(budget.meter)
    try:
        parts, size = [], 0
        for part in _compiled(source).generate(messages=chat, **variables):
            size += len(part)
            _require(size, MAX_CHARS)
            budget.meter.tick()
            parts.append(part)
    except RecursionError as error:
        raise TemplateLimit("the model's chat template goes too deep") from error
    except FAULTS as error:
        raise TemplateRefusal(str(error)) from error
    finally:
        _METER.reset(token)
    text = "".join(parts)
    return _before_the_tag(text, final) if continue_final else text


def _shown(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message under all the names that templates read its thoughts by."""
    fields = {name: value for name, value in message.items() if value is not None}
    thoughts = fields.get("reasoning_content")
    return fields if thoughts is None else {"thinking": thoughts, **fields}


def _before_the_tag(text: str, final: str) -> str:
    """Cut a text where its last message ends, so that the model goes on with it."""
    at = text.rfind(CONTINUE.strip())
    if at < 0 or final.strip() not in text:
        raise TemplateRefusal("its last message is not shown as it is, so it cannot be continued")
    kept = text[at : at + len(CONTINUE)] == CONTINUE
    return text[:at] if kept else text[:at].rstrip()
