"""Chat templates: from messages to text. The text is the same on every day, and every message is in it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from lightning_mlc.errors import UserError, first_line

Message = dict[str, str]

_DATE = {
    "%-d": "26", "%d": "26", "%a": "Fri", "%A": "Friday", "%b": "Jul", "%B": "July", "%-m": "7", "%m": "07",
    "%Y": "2024", "%y": "24", "%j": "208", "%H": "00", "%I": "12", "%M": "00", "%S": "00", "%p": "AM",
    "%F": "2024-07-26", "%D": "07/26/24", "%x": "07/26/24", "%e": "26", "%h": "Jul", "%u": "5", "%w": "5", "%G": "2024",
    "%V": "30", "%U": "29", "%W": "30", "%T": "00:00:00", "%X": "00:00:00", "%R": "00:00", "%-H": "0", "%-I": "12",
    "%-M": "0", "%-S": "0", "%-y": "24", "%-j": "208", "%f": "000000", "%c": "Fri Jul 26 00:00:00 2024",
    "%Z": "", "%z": "",
}  # fmt: skip
"""The day that every template is told: 26 July 2024, which Llama 3's takes where it cannot ask for one."""
_STRFTIME_NOW = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('{code}', '{text}')" for code, text in _DATE.items())
    + " }}{% endmacro %}\n"
)
"""What takes the place of the clock. transformers hands a template no function of a caller's, but a macro is text."""


class TemplateProblem(Exception):
    """A conversation that a chat template cannot render, or renders without one of its messages.

    Args:
        does: What the template does, without its object: ``refuses``.
        reason: Why, in its own words.
    """

    def __init__(self, does: str, reason: str = "") -> None:
        super().__init__(does, reason)
        self.does = does
        self.reason = reason

    def told(self, given: str) -> str:
        """What the template does to what it was ``given`` (``this prompt``), for a message."""
        return f"{self.does} {given}" + (f" ({self.reason})" if self.reason else "")


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: The tokenizer.

    Raises:
        UserError: It has no chat template, or several of which none is the default.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        templates = tokenizer.chat_template
        if not templates:
            raise UserError(
                "model.name_or_path",
                f"the tokenizer of {tokenizer.name_or_path} has no chat template; use a chat "
                "(instruct) model, or put a chat_template.jinja into its folder",
            )
        if isinstance(templates, dict) and "default" not in templates:
            raise UserError(
                "model.name_or_path",
                f"the tokenizer of {tokenizer.name_or_path} has no default chat template, only "
                f"{', '.join(templates)}; put the one to use into its folder as chat_template.jinja",
            )
        text: str = templates["default"] if isinstance(templates, dict) else templates
        self._tokenizer = tokenizer
        self._text = _STRFTIME_NOW + text if "strftime_now" in text else text
        self._forms: dict[tuple[str, ...], bool] = {}

    def render(self, conversations: Sequence[Sequence[Message]], header: bool) -> list[str]:
        """The text of each of ``conversations``, with the generation header if ``header``.

        Raises:
            TemplateProblem: The template refuses one of them, or leaves a message out.
        """
        texts = self.render_unchecked(conversations, header)
        for messages, text in zip(conversations, texts, strict=True):
            for number, message in enumerate(messages, start=1):
                if not contains(text, message["content"]):
                    raise TemplateProblem(
                        f"changes or leaves out some of the text of message {number} ({message['role']}) of"
                    )
        return texts

    def render_unchecked(self, conversations: Sequence[Sequence[Message]], header: bool) -> list[str]:
        """The same, whether or not the template puts all of the messages into it.

        Raises:
            TemplateProblem: The template refuses one of them.
        """
        given = [_in_parts(m) if self._wants_parts(m) else list(m) for m in conversations]
        return self._apply(given, header)

    @cached_property
    def sample(self) -> tuple[str, str]:
        """A prompt with the generation header, and the same with its response; empty where one of them is refused."""
        asked = [{"role": "user", "content": "prompt"}]
        try:
            (header,) = self.render_unchecked([asked], header=True)
            (whole,) = self.render_unchecked([[*asked, {"role": "assistant", "content": "response"}]], header=False)
        except TemplateProblem:
            return "", ""
        return header, whole

    @cached_property
    def opened_block(self) -> str:
        """How the generation header ends where it opens a block in which a model thinks (``<think>`` and a line break).

        Empty where it opens none. It is such a block by its name, or because finished turns do not have it.
        """
        header, whole = self.sample
        tag = re.search(r"(<(?P<name>[\w:]+)>|\[(?P<NAME>[A-Z]+)\]|(?:<\||◁)(?!(?i:end))\w+(?:\|>|▷))\s*$", header)
        if tag is None:
            return ""
        # Tokens such as <|assistant|>, which stand for a role, open a block only if their name says so.
        is_there = header.count(tag[1]) == whole.count(tag[1]) or not (tag["name"] or tag["NAME"])
        return "" if is_there and not re.search("think|thought|reason", tag[1].lower()) else tag[0]

    @property
    def closed_block(self) -> str:
        """What ends the block that the generation header opens: ``</think>``, ``<|END_THINKING|>``."""
        opened = self.opened_block.strip()
        if begun := re.match(r"(\W+)(?:start|begin)(?=_)", opened, re.IGNORECASE):
            end = "END" if opened.isupper() else "end"
            return begun[1] + end + opened[begun.end() :]
        before = re.match(r"<\||\W", opened)
        return f"{before[0]}/{opened[before.end() :]}" if before else ""

    def _wants_parts(self, messages: Sequence[Message]) -> bool:
        # A dictionary, because a wrapper of functools cannot be pickled, and processes may be spawned with this.
        roles = tuple(message["role"] for message in messages)
        if roles not in self._forms:
            self._forms[roles] = self._find_form(roles)
        return self._forms[roles]

    def _find_form(self, roles: tuple[str, ...]) -> bool:
        """Whether the template wants the content of such messages as a list of parts."""
        marked = [{"role": role, "content": f"message{n}text"} for n, role in enumerate(roles, start=1)]
        problem = None
        for parts in (False, True):
            given = _in_parts(marked) if parts else marked
            try:
                (text,) = self._apply([given], header=False)
            except TemplateProblem as error:
                problem = problem or error
                continue
            missing = next((message for message in marked if message["content"] not in text), None)
            # One that takes parts for text may write them as Python does.
            if missing is None and not (parts and any(str(message["content"]) in text for message in given)):
                return parts
            if missing is not None:
                problem = problem or TemplateProblem(f"has no place for the message of the {missing['role']} in")
        assert problem is not None
        raise problem

    def _compiled(self) -> Any:
        """The template as transformers compiles it; None if the tokenizer has its own way to apply it.

        ``apply_chat_template`` takes as long again to turn any kind of message into the plain ones that ours are. It is
        asked for each time, because transformers keeps it, and because it cannot be sent to another process.
        """
        own = type(self._tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template
        compiler = getattr(chat_template_utils, "_compile_jinja_template", None)
        if own or compiler is None:
            return None
        template = compiler(self._text)
        # They are copied for each text, and a chain of dictionaries, which they are, takes ten times as long to copy.
        template.globals = dict(template.globals)
        return template

    def _apply(self, conversations: Sequence[Sequence[object]], header: bool) -> list[str]:
        try:
            if (template := self._compiled()) is not None:
                told: dict[str, Any] = {"tools": None, "documents": None, "add_generation_prompt": header}
                told |= self._tokenizer.special_tokens_map
                return [template.render(messages=messages, **told) for messages in conversations]
            texts = self._tokenizer.apply_chat_template(
                conversations,  # type: ignore[arg-type]
                chat_template=self._text,
                add_generation_prompt=header,
                tokenize=False,
            )
        except Exception as error:  # a template is a program: besides jinja2's, any error of Python may come
            raise TemplateProblem("refuses", first_line(error)) from error
        return list(texts)


def contains(text: str, content: str) -> bool:
    """Whether ``content`` is in ``text``, apart from white space, which templates trim and add."""
    return content.strip() in text or "".join(content.split()) in "".join(text.split())


def _in_parts(messages: Sequence[Message]) -> list[dict[str, object]]:
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
