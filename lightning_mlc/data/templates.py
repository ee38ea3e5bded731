"""Chat templates turn messages into text. The text does not depend on today's date, and contains every message."""

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
"""The date that every template gets: 26 July 2024, which Llama 3's template uses if it cannot ask for the date."""
_STRFTIME_NOW = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('{code}', '{text}')" for code, text in _DATE.items())
    + " }}{% endmacro %}\n"
)
"""Replaces the clock. It is a macro in the text, because transformers do not pass a caller's functions to a
template."""


class TemplateProblem(Exception):
    """A conversation that a chat template cannot render, or renders without one of its messages.

    Args:
        does: A verb for what the template does, such as ``refuses``. The object follows.
        reason: The template's own error message, if there is one.
    """

    def __init__(self, does: str, reason: str = "") -> None:
        super().__init__(does, reason)
        self.does = does
        self.reason = reason

    def told(self, given: str) -> str:
        """Return a text for a message: what the template does to ``given``, such as ``this prompt``."""
        return f"{self.does} {given}" + (f" ({self.reason})" if self.reason else "")


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: The tokenizer.

    Raises:
        UserError: It has no chat template, or several and none is the default.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        templates = tokenizer.chat_template
        if not templates:
            raise UserError(
                "model.name_or_path",
                f"the tokenizer of {tokenizer.name_or_path} has no chat template; use a chat (instruct) model, or give "
                "one (`plain` or a Jinja file) as --model.chat_template of fit or --chat_template of evaluate; in "
                "Python, set tokenizer.chat_template",
            )
        if isinstance(templates, dict) and "default" not in templates:
            raise UserError(
                "model.name_or_path",
                f"the tokenizer of {tokenizer.name_or_path} has no default chat template, only "
                f"{', '.join(templates)}; write the one to use to a file, and set chat_template to it",
            )
        text: str = templates["default"] if isinstance(templates, dict) else templates
        self._tokenizer = tokenizer
        self._text = _STRFTIME_NOW + text if "strftime_now" in text else text
        self._forms: dict[tuple[str, ...], bool] = {}

    def render(self, conversations: Sequence[Sequence[Message]], header: bool) -> list[str]:
        """Turn conversations into texts.

        Args:
            conversations: Messages of each conversation.
            header: Whether to add the generation header, with which a response begins.

        Raises:
            TemplateProblem: The template refuses a conversation, or leaves out some text of a message.
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
        """Turn conversations into texts, without checking that these contain all messages.

        Args:
            conversations: Messages of each conversation.
            header: Whether to add the generation header.

        Raises:
            TemplateProblem: The template refuses a conversation.
        """
        given = [_in_parts(m) if self._wants_parts(m) else list(m) for m in conversations]
        return self._apply(given, header)

    @cached_property
    def sample(self) -> tuple[str, str]:
        """A prompt with the generation header, and the same prompt with a response. Empty if one of them is refused."""
        asked = [{"role": "user", "content": "prompt"}]
        try:
            (header,) = self.render_unchecked([asked], header=True)
            (whole,) = self.render_unchecked([[*asked, {"role": "assistant", "content": "response"}]], header=False)
        except TemplateProblem:
            return "", ""
        return header, whole

    @cached_property
    def opened_block(self) -> str:
        """The end of a generation header that opens a block for thoughts, such as ``<think>`` and a line break.

        Empty if the header opens no such block. A block is recognised by its name, or because finished turns lack it.
        """
        header, whole = self.sample
        tag = re.search(r"(<(?P<name>[\w:]+)>|\[(?P<NAME>[A-Z]+)\]|(?:<\||◁)(?!(?i:end))\w+(?:\|>|▷))\s*$", header)
        if tag is None:
            return ""
        # Tokens such as <|assistant|> may stand for a role. They open a block only if their name says so.
        is_there = header.count(tag[1]) == whole.count(tag[1]) or not (tag["name"] or tag["NAME"])
        return "" if is_there and not re.search("think|thought|reason", tag[1].lower()) else tag[0]

    @property
    def closed_block(self) -> str:
        """The text that closes the block, such as ``</think>`` or ``<|END_THINKING|>``."""
        opened = self.opened_block.strip()
        if begun := re.match(r"(\W+)(?:start|begin)(?=_)", opened, re.IGNORECASE):
            end = "END" if opened.isupper() else "end"
            return begun[1] + end + opened[begun.end() :]
        before = re.match(r"<\||\W", opened)
        return f"{before[0]}/{opened[before.end() :]}" if before else ""

    def _wants_parts(self, messages: Sequence[Message]) -> bool:
        # A dictionary, because spawned processes need to pickle this, and wrappers of functools cannot be pickled.
        roles = tuple(message["role"] for message in messages)
        if roles not in self._forms:
            self._forms[roles] = self._find_form(roles)
        return self._forms[roles]

    def _find_form(self, roles: tuple[str, ...]) -> bool:
        """Try whether the template needs the content of messages with these roles as a list of parts."""
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
            # A template that expects text would write a list of parts as Python code.
            if missing is None and not (parts and any(str(message["content"]) in text for message in given)):
                return parts
            if missing is not None:
                problem = problem or TemplateProblem(f"has no place for the message of the {missing['role']} in")
        assert problem is not None
        raise problem

    def _compiled(self) -> Any:
        """Return the template as transformers compile it. None: the tokenizer has its own way to apply it.

        ``apply_chat_template`` would take twice as long, because it first converts messages of any form to plain ones.
        The template is not kept here, because transformers cache it and it cannot be sent to another process.
        """
        own = type(self._tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template
        compiler = getattr(chat_template_utils, "_compile_jinja_template", None)
        if own or compiler is None:
            return None
        template = compiler(self._text)
        # The globals are copied for each text. Copying their chain of dictionaries would take ten times as long.
        template.globals = dict(template.globals)
        return template

    def _apply(self, conversations: Sequence[Sequence[object]], header: bool) -> list[str]:
        try:
            if (template := self._compiled()) is not None:
                variables: dict[str, Any] = {"tools": None, "documents": None, "add_generation_prompt": header}
                variables |= self._tokenizer.special_tokens_map
                return [template.render(messages=messages, **variables) for messages in conversations]
            texts = self._tokenizer.apply_chat_template(
                conversations,  # type: ignore[arg-type]
                chat_template=self._text,
                add_generation_prompt=header,
                tokenize=False,
            )
        except Exception as error:  # a template is a program, which may raise any error
            raise TemplateProblem("refuses", first_line(error)) from error
        return list(texts)


def contains(text: str, content: str) -> bool:
    """Whether ``content`` is in ``text``. White space is ignored, because templates trim and add it."""
    return content.strip() in text or "".join(content.split()) in "".join(text.split())


def _in_parts(messages: Sequence[Message]) -> list[dict[str, object]]:
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
