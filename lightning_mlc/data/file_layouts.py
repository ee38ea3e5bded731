"""Layouts of data files: from a row of a file to an :class:`~lightning_mlc.data.records.Example`.

Our own layout::

    {"id": "...", "prompt": {"en": TEXT, "sw": TEXT}, "chosen": TEXT, "rejected": TEXT}
    or, instead of the pair,                          "response": TEXT               or  "response": TEXT, "label": BOOL

TEXT is a string or a list of messages (``{"role", "content"}``). ``chosen`` and ``rejected`` may also be
``{"en": TEXT, "sw": TEXT}``, in every layout. Files that cannot nest, such as CSV, have the prompts in columns
``prompt_en``, ``prompt_sw``, ... Files made for other trainers can keep their ``prompt``, and have the other
languages in a column ``translations``: ``{"sw": TEXT, ...}``.

Layouts of the MLC authors, whose prompt without a suffix is in the source language: preference pairs (``prompt``,
``prompt_sw``, ... as ShareGPT turns, ``chosen``, ``rejected``) and Alpaca (``instruction``, ``input``, ``output``,
``prompt_sw``, ...). In each of them a response may be called ``response``, ``output`` or ``completion``.

Layout of MultiJail (arXiv 2310.06474), prompts without responses: ``id``, ``source``, ``tags``, and one column per
language, named by its code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Literal, TypeGuard

from lightning_mlc.data.kinds import ORDINARY, kind_of
from lightning_mlc.data.languages import canonical_language, canonical_languages, is_language
from lightning_mlc.data.records import KIND_NAMES, PAIR, RESPONSES, DataKind, Example, Message, Place, Row
from lightning_mlc.data.uniqueness import UniqueIds
from lightning_mlc.errors import UserError, shortened

_PREFIX = "prompt_"
_TRANSLATIONS = "translations"
_BESIDE_LANGUAGES = frozenset({"id", "source", "tags"})
"""Columns of MultiJail that are not languages."""
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}

_LEFT_OUT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""Parts of a message in addition to its text. A row with one is refused, because training without it would train on
something else."""

_HALF = re.compile("[\ud800-\udfff]")
"""Unpaired surrogates. JSON can contain them, but no tokenizer and no file can."""


def has_half_a_character(text: str) -> bool:
    """Whether ``text`` has an unpaired surrogate."""
    return _HALF.search(text) is not None


def parse_rows(rows: Iterable[tuple[Place, Row]], source_language: str) -> Iterator[Example]:
    """Parse ``rows`` one by one. The first row of each source decides on its layout.

    About thirty bytes are kept of each row, so an error that concerns two rows is raised at the second one.

    Args:
        rows: Rows of one or several sources, each with its place (:func:`~lightning_mlc.data.reading.read_rows`).
        source_language: Canonical code of the language of the responses.

    Raises:
        UserError: A row is malformed; two examples have the same id, or are of different kinds.
    """
    ids = UniqueIds()
    kind: DataKind | None = None
    sources: list[str] = []
    for where, row, prompts in prompts_of_rows(rows, source_language):
        example = _example(row, where, source_language, prompts)
        if not sources or sources[-1] != where.source:
            sources.append(where.source)
        if (taken := ids.row_with(example.id, len(sources) - 1 << 40 | where.number)) is not None:
            raise repeated_id(where, example.id, Place(sources[taken >> 40], taken & (1 << 40) - 1))
        if kind is None:
            kind = example.kind
        elif kind != example.kind:
            raise UserError(
                where,
                f"has {KIND_NAMES[example.kind]}, the rows before it have {KIND_NAMES[kind]}; "
                "train data of different kinds in separate runs",
            )
        yield example


def repeated_id(where: Place, id: str, first: Place) -> UserError:
    """The error for a row whose ``id`` an earlier row has."""
    return UserError(where, f"the id '{shortened(id)}' is taken by {first}; ids must be unique")


def prompts_of_rows(
    rows: Iterable[tuple[Place, Row]], source_language: str, any_text: bool = False
) -> Iterator[tuple[Place, Row, dict[str, list[Message]]]]:
    """Place, row, and conversations by language, of each row. The first row of each source decides on its layout.

    Args:
        rows: Rows of one or several sources, each with its place.
        source_language: Canonical code of the language of a prompt whose column does not say.
        any_text: Whether a text may be empty or contain an unpaired surrogate, which training refuses.

    Raises:
        UserError: A row has no prompt in that layout.
    """
    prompts_of: _Layout | None = None
    source = ""
    for where, row in rows:
        if prompts_of is None or where.source != source:
            prompts_of, source = _layout_of(row, where), where.source
        yield where, row, _by_language(prompts_of(row, where, source_language), where, any_text)


_Layout = Callable[[Row, str, str], Iterable[tuple[str, Any]]]
"""Finds the prompts of a row, each with the code of its language."""


def _layout_of(row: Row, where: str) -> _Layout:
    if isinstance(row.get("prompt"), Mapping):
        return _nested_prompts
    if "instruction" in row or "prompt" in row or any(key.startswith(_PREFIX) for key in row):
        return _columns
    if (languages := row.keys() - _BESIDE_LANGUAGES) and all(is_language(column) for column in languages):
        return _language_columns
    raise UserError(
        where,
        f"has no prompt; expected a key 'prompt' with one text per language, columns such as "
        f"'prompt_en', or 'instruction' (keys found: {shortened(', '.join(map(str, row))) or 'none'})",
    )


def other_columns(first: Row, where: str) -> Callable[[Row], dict[str, Any]]:
    """A function that gives the columns of a row that hold no prompt. The first row decides on the layout.

    Raises:
        UserError: The first row has no prompt.
    """
    layout = _layout_of(first, where)
    is_alpaca = "instruction" in first

    def is_prompt(key: str) -> bool:
        if layout is _language_columns:
            return key not in _BESIDE_LANGUAGES
        if layout is _nested_prompts:
            return key == "prompt"
        return key == "prompt" or key.startswith(_PREFIX) or (is_alpaca and key in ("instruction", "input"))

    return lambda row: {key: value for key, value in row.items() if not is_prompt(key)}


def require_source(prompts: Collection[str], where: str, source: str, option: str = "data.source_language") -> None:
    """Refuse a row without a prompt in the source language.

    Args:
        prompts: Languages of its prompts.
        where: Its place.
        source: Canonical code of the source language.
        option: The option that names it, for the error.

    Raises:
        UserError: It has none.
    """
    if source not in prompts:
        raise UserError(
            where,
            f"has no prompt in the source language '{source}' "
            f"(it has {', '.join(sorted(prompts)) or 'none'}); add it or set {option}",
        )


def _example(row: Row, where: str, source: str, prompts: dict[str, list[Message]]) -> Example:
    require_source(prompts, where, source)
    chosen: str | None
    rejected: str | None
    label: bool | None = None
    if any(not _is_null(row.get(key)) for key in PAIR):
        chosen, rejected, translated = pair_of(row, prompts, where, source)
    else:
        key = next((key for key in RESPONSES if not _is_null(row.get(key))), None)
        if key is None:
            raise UserError(where, "has no response; expected 'chosen' and 'rejected', or 'response'")
        response, label, translated = _response(row[key], f"'{key}'", where), _label(row, where), {}
        chosen, rejected = (None, response) if label is False else (response, None)
    is_ordinary = kind_of(row, where) == ORDINARY
    return Example(id_of(row, where), where, prompts, chosen, rejected, label is not None, translated, is_ordinary)


def id_of(row: Row, where: str) -> str:
    """The row's ``id``; its place if it has none.

    Raises:
        UserError: The id is neither a string nor a number.
    """
    own_id = row.get("id")
    if own_id is not None and (not isinstance(own_id, str | int) or isinstance(own_id, bool)):
        raise UserError(where, f"'id' must be a string or a whole number, got {type(own_id).__name__}")
    if has_half_a_character(str(own_id)):
        raise UserError(where, "'id' contains an unpaired surrogate (such as \\ud83d); fix the encoding")
    return str(own_id) if own_id is not None else where


def _nested_prompts(row: Row, where: str, source: str) -> Iterable[tuple[str, Any]]:
    prompt = row.get("prompt")
    if not isinstance(prompt, Mapping):
        raise UserError(where, '\'prompt\' must hold one text per language, such as {"en": ..., "sw": ...}')
    return prompt.items()


def _columns(row: Row, where: str, source: str) -> Iterable[tuple[str, Any]]:
    """Prompts of ``prompt_en``, ..., of ``translations``, and of the column that is in the source language."""
    instruction, extra = row.get("instruction"), row.get("input")
    if isinstance(instruction, str) and isinstance(extra, str) and extra.strip():
        instruction = f"{instruction}\n{extra}"
    columns = [(key.removeprefix(_PREFIX), text) for key, text in row.items() if key.startswith(_PREFIX)]
    translations = row.get(_TRANSLATIONS)
    if isinstance(translations, Mapping):
        columns += translations.items()
    elif not _is_null(translations):
        raise UserError(where, f"'translations' must hold one text per language, got {type(translations).__name__}")
    return [(source, _first_given(instruction, row.get("prompt"))), *columns]


def _language_columns(row: Row, where: str, source: str) -> Iterable[tuple[str, Any]]:
    return [(key, text) for key, text in row.items() if key not in _BESIDE_LANGUAGES]


def _by_language(texts: Iterable[tuple[str, Any]], where: str, any_text: bool) -> dict[str, list[Message]]:
    """Conversations by canonical language, without the languages whose text is null."""
    prompts: dict[str, list[Message]] = {}
    seen: dict[str, str] = {}
    for code, text in texts:
        language = canonical_language(code, where)
        if _is_null(text):
            continue
        if language in seen:
            raise UserError(where, f"has the language '{language}' twice ('{seen[language]}' and '{code}')")
        seen[language] = code
        messages = _messages(text, "user", f"the prompt in '{code}'", where, "anything" if any_text else "text")
        if messages[-1]["role"] != "user":
            raise UserError(where, f"the prompt in '{code}' must end with a message of the user")
        prompts[language] = messages
    return prompts


def pair_of(
    row: Row, prompts: Collection[str], where: str, source: str, any_text: bool = False
) -> tuple[str, str, dict[str, tuple[str, str]]]:
    """Chosen response, rejected response, and both by language for the other languages that have them.

    Args:
        row: The row.
        prompts: Languages of its prompts.
        where: Its place, for errors.
        source: Canonical code of the source language.
        any_text: As in :func:`prompts_of_rows`.

    Raises:
        UserError: A response is missing or malformed, both are the same, or the prompt that they answer is missing.
    """
    chosen, rejected = (_responses(row.get(key), key, where, source, any_text) for key in PAIR)
    for language in sorted(chosen.keys() ^ rejected.keys()):
        # In one language alone, a model could tell the two apart by their language.
        raise UserError(
            where, f"only one of chosen and rejected is translated into '{language}'; translate both, or neither"
        )
    for language in chosen:
        what = "" if language == source else f" in '{language}'"
        if language not in prompts:
            raise UserError(where, f"has responses{what} but no prompt; add it, or set both responses to null")
        if chosen[language] == rejected[language]:
            raise UserError(
                where,
                f"chosen and rejected are the same{what}; "
                + ("set both to null" if what else "remove the row, there is nothing to prefer"),
            )
    pairs = {language: (chosen[language], rejected[language]) for language in chosen}
    return *pairs.pop(source), pairs


def _responses(given: Any, key: str, where: str, source: str, any_text: bool) -> dict[str, str]:
    """The response ``key`` by language; in the source language alone, unless ``given`` has several."""
    if not _is_by_language(given):
        return {source: _response(given, f"'{key}'", where, any_text)}
    languages = canonical_languages(given, f"{where}: '{key}'")
    found = {
        language: _response(text, f"'{key}' in '{language}'", where, any_text)
        for language, text in zip(languages, given.values(), strict=True)
        if not _is_null(text)
    }
    if source not in found:
        raise UserError(where, f"has no '{key}' in the source language '{source}'")
    return found


def _is_by_language(responses: Any) -> TypeGuard[Mapping[str, Any]]:
    """Whether they are one text per language, and not a single message."""
    return isinstance(responses, Mapping) and _is_null(responses.get("content")) and _is_null(responses.get("value"))


def _response(given: Any, what: str, where: str, any_text: bool = False) -> str:
    if _is_null(given):
        raise UserError(where, f"has no {what}")
    # It may be empty, as in PKU-SafeRLHF: silence is an answer, too.
    messages = _messages(given, "assistant", what, where, "anything" if any_text else "maybe empty")
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise UserError(where, f"{what} must be one message of the assistant, or a string")
    return messages[0]["content"]


def _label(row: Row, where: str) -> bool | None:
    """Whether the response is desirable; None without a label."""
    label = row.get("label")
    if label is None:
        return None
    if not isinstance(label, bool):
        raise UserError(
            where,
            f"'label' must be true (a desirable response) or false, got {type(label).__name__}; "
            "leave the key out for instruction data",
        )
    return label


def _is_null(value: Any) -> bool:
    """Whether ``value`` is missing. Tables cannot leave keys out; they have null, or null in each key."""
    return value is None or (isinstance(value, Mapping) and bool(value) and all(map(_is_null, value.values())))


def _first_given(first: Any, second: Any) -> Any:
    return second if _is_null(first) else first


_Allowed = Literal["text", "maybe empty", "anything"]
"""Which strings are accepted as the content of a message."""


def _messages(text: Any, role: str, what: str, where: str, allowed: _Allowed) -> list[Message]:
    """Messages of ``text``: a string, one turn, or a list of turns in the form of OpenAI or ShareGPT."""
    if isinstance(text, str):
        return [{"role": role, "content": _text(text, what, where, allowed)}]
    turns: list[Any]
    if isinstance(text, Mapping):
        turns = [text]
    elif isinstance(text, list) and text:
        turns = text
    else:
        got = "an empty list" if text == [] else type(text).__name__
        raise UserError(
            where, f"{what} must be a string or a list of messages, got {got}; give null where there is none"
        )
    messages = []
    for turn in turns:
        if not isinstance(turn, Mapping):
            raise UserError(where, f"{what} must be a list of messages with 'role' and 'content'")
        if left_out := [key for key in _LEFT_OUT if turn.get(key)]:
            raise UserError(where, f"{what} has a message with '{left_out[0]}', which is not supported; remove it")
        content = _first_given(turn.get("content"), turn.get("value"))
        known = _ROLES.get(str(_first_given(turn.get("role"), turn.get("from"))))
        if known is None or not isinstance(content, str):
            raise UserError(where, f"{what} has a message without a known 'role' or without 'content'")
        messages.append({"role": known, "content": _text(content, what, where, allowed)})
    return messages


def _text(content: str, what: str, where: str, allowed: _Allowed) -> str:
    if allowed == "anything":
        return content
    if allowed == "text" and not content.strip():
        raise UserError(where, f"{what} is empty; give a text, or null where there is none")
    if has_half_a_character(content):
        raise UserError(where, f"{what} contains an unpaired surrogate (such as \\ud83d); fix the encoding")
    return content


def without(row: Row, language: str, response_only: bool = False) -> Row:
    """A copy of ``row``, of any layout, in which everything in ``language`` is null, which counts as missing.

    Args:
        row: The row. It is not changed.
        language: Canonical code, not that of the source language.
        response_only: Whether the prompt stays. Responses go in pairs, so both become null in any case.
    """

    def is_it(code: str) -> bool:
        return is_language(code) and canonical_language(code, "") == language

    def emptied(texts: Mapping[str, Any]) -> dict[str, Any]:
        return {code: None if is_it(code) else text for code, text in texts.items()}

    changed = dict(row)
    for key in PAIR:
        if _is_by_language(given := row.get(key)):
            changed[key] = emptied(given)
    if response_only:
        return changed
    layout = _layout_of(row, "")
    if layout is _nested_prompts:
        return {**changed, "prompt": emptied(row.get("prompt") or {})}
    if layout is _language_columns:
        return emptied(changed)
    if isinstance(translations := changed.get(_TRANSLATIONS), Mapping):
        changed[_TRANSLATIONS] = emptied(translations)
    return {key: None if key.startswith(_PREFIX) and is_it(key[len(_PREFIX) :]) else changed[key] for key in changed}
