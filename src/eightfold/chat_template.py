"""Chat templates: messages in, text out; and which control tokens of that text are the template's own.

A template is a Jinja program that comes with a checkpoint, so it runs in Jinja's sandbox and sees plain data only.

Its text holds control tokens (`</s>`, `[INST]`), and what people wrote may spell the same. To tell them apart the
template is rendered twice, the second time with each character that can begin or end a control's spelling replaced,
in the messages alone, by a stand-in that occurs nowhere else. A control found whole in the second text is the
template's. This survives what templates do to content (trim, concatenate, cut, put into JSON), for both must be
equal once the stand-ins are put back. Where they aren't, the template looks for such characters itself;
then the first text is used if the messages spell no control at all, and refused if they do. (A control of which
only the middle is content, such as `'<|' + message.role + '|>'`, counts as the template's: it is meant so.)
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

from eightfold.types import EightfoldError
from eightfold.vocabulary import Spellings

Messages = Sequence[Mapping[str, Any]]
_ROLES = ("system", "developer", "user", "assistant", "tool")
_DEPTH = 100  # of lists and objects within a message

# Mixtral's own form. With [INST] as a control token (8x22B) no space surrounds it and the system prompt goes to the
# last user message; without (8x7B) [INST] is text, and it goes to the first. `space` is what makes the first token of a
# piece of text begin with a space where the tokenizer doesn't see to that itself.
FALLBACK = """
{%- if messages and messages[0].role == 'system' %}
    {%- set system, turns = messages[0].content + '\\n\\n', messages[1:] %}
{%- else %}
    {%- set system, turns = '', messages %}
{%- endif %}
{%- set users = turns | selectattr('role', 'equalto', 'user') | list | length %}
{%- set holder = 2 * users - 2 if inst_is_control else 0 %}
{{- bos_token }}
{%- for message in turns %}
    {%- if message.role not in ['user', 'assistant'] or (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('after an optional system message, user and assistant take turns, and the user begins') }}
    {%- endif %}
    {%- set content = (system if loop.index0 == holder else '') + message.content %}
    {%- if message.role == 'assistant' %}
        {{- (space if inst_is_control else ' ') + (content.rstrip(' ') if inst_is_control else content) + eos_token }}
    {%- elif inst_is_control %}
        {{- '[INST]' + space + content + '[/INST]' }}
    {%- else %}
        {{- space + '[INST] ' + content + ' [/INST]' }}
    {%- endif %}
{%- endfor %}
"""


@dataclass(frozen=True, slots=True)
class _Chat:
    """Messages made plain, and the place that each had in the caller's list (of those joined, the last)."""

    messages: list[dict[str, Any]]
    places: list[int]
    tools: list[Any] | None
    moment: datetime  # one for both renderings


class ChatTemplate:
    """A compiled template. `origin` names where it came from in messages about it."""

    def __init__(self, source: str, origin: str, variables: Mapping[str, Any]) -> None:
        """`variables` are what the template sees beside the messages: bos_token and its like.

        Raises EightfoldError on a template that doesn't parse.
        """
        from jinja2 import TemplateSyntaxError

        self.origin = origin
        self._variables = dict(variables)
        try:
            self._template = _environment().from_string(source)
        except TemplateSyntaxError as error:
            raise EightfoldError(
                f"the chat template ({origin}) is wrong in line {error.lineno}: {error.message}"
            ) from None

    def render(self, messages: Messages, add_generation_prompt: bool, tools: Sequence[Any] | None = None) -> str:
        """The text of a conversation.

        Several system messages at the start become one, two line breaks apart; a template that refuses or drops the
        role gets them as the beginning of the first user message in the same way. Raises EightfoldError on messages
        that aren't chat messages, and with the template's own words and the message it stumbled over if it refuses.
        """
        return self._render(self._chat(messages, tools), add_generation_prompt)

    def pieces(
        self, messages: Messages, add_generation_prompt: bool, tools: Sequence[Any] | None, controls: Spellings
    ) -> list[str | int]:
        """The same text, cut at the template's own control tokens; what the messages spell stays text.

        Raises EightfoldError as `render` does, and if nobody can tell whose a control token is: see above.
        """
        chat = self._chat(messages, tools)
        text = self._render(chat, add_generation_prompt)
        written = _strings([chat.messages, chat.tools])
        word = controls.without_edges.first(written)  # nothing can mark these
        found = controls.split(text)
        if word is None and not any(edge in string for edge in controls.edges for string in written):
            return found
        marked = self._marked_pieces(chat, add_generation_prompt, text, controls) if word is None else []
        if "".join(controls.text_of[piece] if isinstance(piece, int) else piece for piece in marked) == text:
            return marked
        spelt = controls.first(written)
        if spelt is None and [p for p in found if isinstance(p, int)] == [p for p in marked if isinstance(p, int)]:
            return found
        raise EightfoldError(
            f"the messages hold {spelt or 'characters'!r}, of which control tokens are made, and the chat template "
            f"({self.origin}) treats it in a way that hides whose it is: take it out, or use another template"
        )

    def _marked_pieces(
        self, chat: _Chat, add_generation_prompt: bool, text: str, controls: Spellings
    ) -> list[str | int]:
        """The pieces of the second rendering, with the stand-ins put back; none if the template fails on them."""
        spare = (chr(code) for code in range(0x100000, 0x10FFFE) if chr(code) not in text)
        hide = dict(zip(map(ord, sorted(controls.edges)), spare, strict=False))
        show = {ord(stand_in): chr(char) for char, stand_in in hide.items()}
        try:
            marked = controls.split(self._run(_translated(chat, hide), add_generation_prompt))
        except Exception:  # the template took offence at the stand-ins, in whatever way
            return []
        return [piece.translate(show) if isinstance(piece, str) else piece for piece in marked]

    @cached_property
    def _takes_system(self) -> bool:
        probe = [{"role": "system", "content": "system probe"}, {"role": "user", "content": "question"}]
        try:
            return "system probe" in self._run(_Chat(probe, [0, 1], None, datetime.now().astimezone()), True)
        except Exception:  # early Mixtral templates refuse the role, each with words of its own
            return False

    def _chat(self, messages: Messages, tools: Sequence[Any] | None) -> _Chat:
        plain = [_message(message, place) for place, message in enumerate(messages)]
        if not plain:
            raise EightfoldError("a chat needs at least one message")
        places = list(range(len(plain)))
        leading = next((i for i, message in enumerate(plain) if message["role"] != "system"), len(plain))
        joins = leading < len(plain) and plain[leading]["role"] == "user" and not self._takes_system
        if leading > 1 or (leading and joins):
            last = leading if joins else leading - 1
            content = "\n\n".join(str(message["content"]) for message in plain[: last + 1])
            plain, places = [{**plain[last], "content": content}, *plain[last + 1 :]], places[last:]
        return _Chat(
            plain, places, None if tools is None else _plain(list(tools), "tools"), datetime.now().astimezone()
        )

    def _run(self, chat: _Chat, add_generation_prompt: bool, count: int | None = None) -> str:
        text: str = self._template.render(
            **self._variables,
            messages=chat.messages[:count],
            tools=chat.tools,
            strftime_now=chat.moment.strftime,
            add_generation_prompt=add_generation_prompt,
        )
        return text

    def _render(self, chat: _Chat, add_generation_prompt: bool) -> str:
        try:
            return self._run(chat, add_generation_prompt)
        except Exception as error:  # a template is a foreign program: it may fail in any way
            words = " ".join(str(error).split()) or type(error).__name__
            raise EightfoldError(f"the chat template ({self.origin}) refuses {self._culprit(chat)}: {words}") from None

    def _culprit(self, chat: _Chat) -> str:
        """The message after the longest beginning of the conversation that the template accepts."""
        accepted, refused = 0, len(chat.messages) + 1
        while refused - accepted > 1:
            count = (accepted + refused) // 2
            try:
                whole = count >= len(chat.messages)  # what begins with system messages alone may go on well
                if whole or any(message["role"] != "system" for message in chat.messages[:count]):
                    self._run(chat, False, count)
                accepted = count
            except Exception:
                refused = count
        if accepted >= len(chat.messages):
            return "to open an answer to these messages"
        place, role = chat.places[accepted], chat.messages[accepted]["role"]
        return f"message {place} (role {role!r}, counted from 0)"


def _message(message: object, place: int) -> dict[str, Any]:
    """One message as templates expect it. Raises EightfoldError if it is none."""
    name = f"message {place} (counted from 0)"
    if not isinstance(message, Mapping):
        raise EightfoldError(f"{name} is a {type(message).__name__}; it must be an object with role and content")
    plain: dict[str, Any] = _plain(dict(message), name)
    role = plain.get("role")
    if role not in _ROLES:
        raise EightfoldError(f"{name} has the role {role!r}; it must be one of {', '.join(_ROLES)}")
    plain["role"] = "system" if role == "developer" else role
    content = plain.get("content")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, dict) else part
                raise EightfoldError(f"{name} has a content part {kind!r}; this model reads parts of type 'text' only")
        plain["content"] = "\n".join(part["text"] for part in content)
    elif content is None and role == "assistant" and plain.get("tool_calls"):
        plain["content"] = ""
    elif not isinstance(content, str):
        raise EightfoldError(f"{name} has the content {content!r}; it must be a string or a list of text parts")
    _open_arguments(plain.get("tool_calls"))
    return plain


def _open_arguments(tool_calls: object) -> None:
    """Arguments of tool calls as objects: OpenAI's clients send them as JSON in a string, templates want the object."""
    for call in tool_calls if isinstance(tool_calls, list) else ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            with contextlib.suppress(ValueError):  # not JSON: the template gets the string
                function["arguments"] = json.loads(function["arguments"])


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy in plain data, so that a template can reach nothing of ours."""
    if depth > _DEPTH:
        raise EightfoldError(f"{where} is nested more than {_DEPTH} levels deep")
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, where, depth + 1) for item in value]
    raise EightfoldError(f"{where} holds a {type(value).__name__}; only what JSON can say may stand there")


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [string for item in value.items() for string in _strings(list(item))]
    return [string for item in value for string in _strings(item)] if isinstance(value, list) else []


def _translated(chat: _Chat, table: dict[int, str]) -> _Chat:
    def walk(value: Any) -> Any:
        if isinstance(value, str):
            return value.translate(table)
        if isinstance(value, dict):
            return {walk(key): walk(item) for key, item in value.items()}
        return [walk(item) for item in value] if isinstance(value, list) else value

    return _Chat(walk(chat.messages), chat.places, walk(chat.tools), chat.moment)


def _environment() -> Any:
    """Jinja's sandbox with what Hugging Face's templates expect of it."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks the model's own turns for training; for an answer it means nothing."""

        tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return body

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment
