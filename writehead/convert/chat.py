"""Chat templates: a model's own jinja2 text that turns messages into one prompt, rendered in a sandbox."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from json import dumps
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_TEMPLATE_CHARS = 2**20
MAX_CHAT_CHARS = 2**24


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    special: Mapping[str, str],
    *,
    add_generation_prompt: bool = True,
) -> str:
    """The prompt a chat template makes of messages.

    The template may neither reach Python's internals nor change its input, and its output is cut off with an
    error at `MAX_CHAT_CHARS`; a template written to waste time can still do so.

    Args:
        template: jinja2 text, as in `tokenizer_config.json`.
        messages: each with a "role" and a "content".
        special: texts the template may use, such as bos_token.
        add_generation_prompt: end with the words that begin the model's answer.

    Raises:
        ValueError: no message, a message without role, a bad template, or one that refuses these messages.
    """
    _check_messages(messages)
    pieces, size = [], 0
    try:
        stream = _compiled(template).generate(
            messages=[dict(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
            tools=None,
            documents=None,
            **special,
        )
        for piece in stream:
            size += len(piece)
            if size > MAX_CHAT_CHARS:
                raise TemplateError(f"its output is longer than {MAX_CHAT_CHARS} characters")
            pieces.append(piece)
    except Exception as error:  # the template is the model author's program and may fail in any way
        raise ValueError(f"the chat template cannot be applied: {str(error)[:300]}") from error
    return "".join(pieces)


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    if not messages:
        raise ValueError("there are no messages; give at least one with a role and a content")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"message {number} has no role; expected a mapping with role and content")
        if "content" not in message:
            raise ValueError(f"message {number} (role {message['role']}) has no content")


class _Generation(Extension):
    """`{% generation %}` marks the answer for training; here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: object) -> NoReturn:
    raise TemplateError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(value: Any, indent: int | None = None) -> str:
    return dumps(value, ensure_ascii=False, indent=indent)  # unlike jinja2's, without escapes for HTML


@lru_cache(maxsize=8)
def _compiled(template: str) -> Template:
    if len(template) > MAX_TEMPLATE_CHARS:
        raise TemplateError(f"it has {len(template)} characters; at most {MAX_TEMPLATE_CHARS} are read")
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.globals |= {"raise_exception": _raise, "strftime_now": _strftime_now}
    environment.filters["tojson"] = _tojson
    return environment.from_string(template)
