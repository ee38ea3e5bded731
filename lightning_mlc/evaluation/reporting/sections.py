"""The sections of a report about one prompt set: safety, over-refusal, refusal margin, telling apart, rewards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_mlc.data.kinds import HARMFUL
from lightning_mlc.evaluation.judges.roster import MARGIN
from lightning_mlc.evaluation.reporting.document import Block, Heading, Paragraph
from lightning_mlc.evaluation.reporting.figure_tables import FigureTables
from lightning_mlc.evaluation.reporting.measures import (
    DECLINE_GAP,
    INVALID,
    OVER_REFUSAL,
    PREFERS_REFUSAL,
    REFUSAL_MARGIN,
    REFUSED,
    REWARD_ACCURACY,
    REWARD_MARGIN,
    SAFE,
    SEPARATION,
    UNSAFE,
)
from lightning_mlc.evaluation.reporting.results import REWARD
from lightning_mlc.metrics.separation import LEAST_PROMPTS

ABOUT_JUDGES = {
    "refusal": "rules that look for phrases of refusal at the beginning of a response, in about twenty languages. They "
    "report how often a model declines, not whether its responses are harmless: a weak judge, for comparisons of runs.",
    "qwen3guard": "Qwen3Guard-Gen; its label controversial counts as unsafe.",
    "qwen3guard_loose": "Qwen3Guard-Gen; its label controversial counts as safe.",
    "llama_guard": "Llama Guard; it does not report refusals, and knows few languages.",
    "polyguard": "PolyGuard; it knows 17 languages.",
    "llm": "a chat model, asked to grade.",
}

NOT_GREEDY = (
    "the endpoint refuses a temperature of 0 and chooses tokens by its own settings (decoding: default), so another "
    "run gives other figures."
)


def set_sections(results: Mapping[str, Any], part: Mapping[str, Any], tables: FigureTables) -> list[Block]:
    """All sections about the prompt set ``part``.

    Args:
        results: The content of ``results.json``.
        part: The description of the prompt set in ``results``.
        tables: Makes tables and pictures.
    """
    found = _harmful(results, part, tables) if part["kind"] == HARMFUL else _ordinary(results, part, tables)
    return found + _rewards(results, part, tables)


def _judge_as_given(results: Mapping[str, Any], judge: str) -> str:
    """The judge as the command line names it, with its model."""
    own = next(one for one in results["judges"] if one["judge"] == judge)
    sampled = f" Its answers are sampled: {NOT_GREEDY}" if "decoding" in own else ""
    return f"Given as `{own['named']}`.{sampled}"


def _harmful(results: Mapping[str, Any], part: Mapping[str, Any], tables: FigureTables) -> list[Block]:
    name = part["name"]
    found: list[Block] = []
    for judge in tables.judges(name, SAFE):
        about = f"{ABOUT_JUDGES.get(judge, judge)} {_judge_as_given(results, judge)}"
        found += [
            Heading(f"{name}, judged by {judge}"),
            Paragraph(f"Harmful prompts. The judge is {about}"),
            tables.overview(name, judge),
            tables.interval_plot(name, judge, SAFE, "safe responses"),
            *tables.agreement_heatmap(name, judge),
            tables.by_language(name, judge, SAFE, "Safe responses"),
            tables.by_language(name, judge, UNSAFE, "Unsafe responses (attack success)"),
            tables.by_language(name, judge, INVALID, "Invalid responses (empty, unintelligible, off topic)"),
            *tables.differences(name, judge, SAFE, "Safe responses, difference"),
        ]
    found += _margin(name, "How much more likely a refusal is than a compliance. Higher is safer here.", tables)
    return found + _separation(results, name, tables)


def _ordinary(results: Mapping[str, Any], part: Mapping[str, Any], tables: FigureTables) -> list[Block]:
    name = part["name"]
    found: list[Block] = []
    for judge in tables.judges(name, INVALID):
        given = _judge_as_given(results, judge)
        invalid = tables.by_language(name, judge, INVALID, "Invalid responses, which neither refuse nor answer")
        found.append(Heading(f"{name}, judged by {judge}"))
        if not tables.has_measure(name, judge, OVER_REFUSAL):  # the judge does not report refusals
            found += [Paragraph(given), invalid]
            continue
        found += [
            Paragraph(f"Ordinary prompts, which a useful model answers: how often it declines (over-refusal). {given}"),
            tables.interval_plot(name, judge, OVER_REFUSAL, "refused, though ordinary"),
            tables.by_language(name, judge, OVER_REFUSAL, "Refused, though ordinary"),
            invalid,
            *tables.differences(name, judge, OVER_REFUSAL, "Refused, though ordinary, difference"),
        ]
    return found + _margin(
        name, "Ordinary prompts: a useful model is not more likely to refuse them than to comply.", tables
    )


def _margin(part: str, text: str, tables: FigureTables) -> list[Block]:
    if not tables.has_measure(part, MARGIN, REFUSAL_MARGIN):
        return []
    return [
        Heading(f"{part}, {REFUSAL_MARGIN.name}"),
        Paragraph(
            f"{text} Mean log-probability per token of openings that decline, minus that of openings that comply; "
            "the openings are the same for prompts in every language. No response is generated."
        ),
        tables.interval_plot(part, MARGIN, REFUSAL_MARGIN, "refusal margin, nats per token"),
        tables.by_language(part, MARGIN, REFUSAL_MARGIN, "Refusal margin, nats per token"),
        tables.by_language(part, MARGIN, PREFERS_REFUSAL, "Prompts after which a refusal is the more likely opening"),
        *tables.differences(part, MARGIN, REFUSAL_MARGIN, "Refusal margin, difference"),
    ]


def _separation(results: Mapping[str, Any], part: str, tables: FigureTables) -> list[Block]:
    """Whether the harmful prompts of ``part`` are told apart from ordinary ones."""
    declines = tables.judges(part, DECLINE_GAP)
    by_margin = tables.has_measure(part, MARGIN, SEPARATION)
    if not (by_margin or declines):
        return []
    ordinary = ", ".join(f"`{other['name']}`" for other in results["sets"] if other["kind"] != HARMFUL)
    found: list[Block] = [
        Heading(f"{part}, told apart from ordinary prompts"),
        Paragraph(
            f"Harmful prompts against the ordinary ones of {ordinary}. A model that refuses everything looks safe "
            "above, but has chance here. By margin: how often a harmful prompt has the larger refusal margin, if "
            "one prompt of each kind is drawn (area under the ROC curve; 0.5 is chance, 1 is perfect, ties count "
            "half). By declines: the share of harmful prompts that are declined, minus that of ordinary ones (0 is "
            f"chance, 100 is perfect). A language with fewer than {LEAST_PROMPTS} prompts of a kind has no figure."
        ),
    ]
    if by_margin:
        found += [
            tables.interval_plot(part, MARGIN, SEPARATION, "told apart by refusal margin, AUC"),
            tables.by_language(part, MARGIN, SEPARATION, "Told apart by refusal margin (AUC)"),
            *tables.differences(part, MARGIN, SEPARATION, "Told apart by refusal margin, difference"),
        ]
    for judge in declines:
        found += [
            tables.interval_plot(part, judge, DECLINE_GAP, f"declined more often than ordinary prompts, by {judge}"),
            tables.by_language(part, judge, REFUSED, f"Harmful prompts declined, judged by {judge}"),
            tables.by_language(part, judge, DECLINE_GAP, f"The same minus ordinary prompts declined, by {judge}"),
            *tables.differences(part, judge, DECLINE_GAP, f"Told apart by declines ({judge}), difference"),
        ]
    return found


def _rewards(results: Mapping[str, Any], part: Mapping[str, Any], tables: FigureTables) -> list[Block]:
    name = part["name"]
    if not tables.has_measure(name, REWARD, REWARD_MARGIN):
        return []
    reference = results["settings"]["reference"]
    unit = "nats per token" if reference is None else f"nats, relative to {reference}"
    return [
        Heading(f"{name}, chosen against rejected"),
        Paragraph(
            "How often the chosen response is more likely than the rejected one, and by how much. Both are in the "
            "source language, after the prompt in each language. Likelihood is measured as "
            + ("log-probability per token." if reference is None else f"the log-ratio to `{reference}` (DPO, beta 1).")
        ),
        tables.interval_plot(name, REWARD, REWARD_MARGIN, f"reward margin, {unit}"),
        tables.by_language(name, REWARD, REWARD_ACCURACY, "Reward accuracy"),
        tables.by_language(name, REWARD, REWARD_MARGIN, f"Reward margin, {unit}"),
        *tables.differences(name, REWARD, REWARD_MARGIN, "Reward margin, difference"),
    ]
