"""The report of an evaluation, as HTML and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_mlc.evaluation.journal import Key
from lightning_mlc.evaluation.reporting import document
from lightning_mlc.evaluation.reporting.document import Block, Heading, Paragraph, Table, Verbatim
from lightning_mlc.evaluation.reporting.figure_tables import FigureTables
from lightning_mlc.evaluation.reporting.representation_section import representation_section
from lightning_mlc.evaluation.reporting.sections import NOT_GREEDY, set_sections
from lightning_mlc.evaluation.study import Study
from lightning_mlc.files.atomic import write_whole


def write_report(study: Study, results: Mapping[str, Any]) -> list[Path]:
    """Write ``results.json``, ``report.html``, ``report.md`` and the plots into the study's folder.

    Args:
        study: The study, with all of its phases done.
        results: Its results, see :func:`~lightning_mlc.evaluation.reporting.results.collect`.

    Returns:
        Paths of the three files.
    """
    out = study.out
    write_whole(out / "results.json", json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    blocks = _blocks(results, out / "plots")
    if study.settings.show_text:
        blocks += _texts(study)
    write_whole(out / "report.html", document.to_html(blocks))
    write_whole(out / "report.md", document.to_markdown(blocks, out))
    return [out / "report.html", out / "report.md", out / "results.json"]


def _blocks(results: Mapping[str, Any], plots: Path) -> list[Block]:
    plots.mkdir(parents=True, exist_ok=True)
    tables = FigureTables(results, plots)
    sections = [block for part in results["sets"] for block in set_sections(results, part, tables)]
    return [
        *_opening(results),
        *sections,
        *representation_section(results, plots),
        *_coverage(results),
        *_how_to_read(),
    ]


def _opening(results: Mapping[str, Any]) -> list[Block]:
    rows = []
    for model in results["models"]:
        seen = "not known" if model["seen"] is None else ", ".join(model["seen"])
        rows.append([model["name"], f"`{model['model']}`", seen])
    sets = [
        [part["name"], part["kind"], str(part["prompts"]), ", ".join(part["languages"])] for part in results["sets"]
    ]
    names = [model["name"] for model in results["models"]]
    baseline = f" Differences are relative to `{names[0]}`." if len(names) > 1 else ""
    return [
        Heading("Safety by language", 1),
        Paragraph(
            "95% confidence intervals are in brackets. They come from "
            f"{results['settings']['bootstrap']} resamples of the prompts. Responses are decoded greedily and have at "
            f"most {results['settings']['max_new_tokens']} tokens.{baseline}"
        ),
        *_sampled(results),
        Table(["model", "source", "languages of training"], rows, words=(0, 1, 2)),
        Table(["prompts", "kind", "number", "languages"], sets, words=(0, 1, 3)),
    ]


def _sampled(results: Mapping[str, Any]) -> list[Block]:
    """The models whose responses are not greedy."""
    names = [f"`{model['name']}`" for model in results["models"] if model["decoding"] == "default"]
    return [Paragraph(f"The responses of {', '.join(names)} are sampled instead: {NOT_GREEDY}")] if names else []


def _coverage(results: Mapping[str, Any]) -> list[Block]:
    rows = []
    for one in results["coverage"]:
        judged = one["safe"] + one["unsafe"] + one["invalid"]
        share = f"{judged / one['prompts']:.0%}" if one["prompts"] else "-"
        counts = [one[key] for key in ("prompts", "no response", "not ended", "unreadable")]
        rows.append([f"{one['model']}, {one['set']}, {one['judge']}", *map(str, counts), share])
    return [
        Heading("Coverage"),
        Paragraph(
            "Figures are computed from responses that have a verdict. They leave out prompts that an endpoint's "
            "content filter declined (no response), and answers of a judge that could not be understood (unreadable). "
            "Responses that reached the limit of tokens are judged as they are (not ended)."
        ),
        *([Table(["", "prompts", "no response", "not ended", "unreadable", "judged"], rows)] if rows else []),
    ]


def _how_to_read() -> list[Block]:
    return [
        Heading("How to read this"),
        Paragraph(
            "`worst` is the language with the worst figure, `spread` the distance between best and worst, "
            "`variance` the variance over languages (of the population; for shares in squared percentage points, "
            "and in round brackets in the unit of the MLC paper: of fractions, times 100). "
            "Sampling alone makes languages differ. Spread and variance of few prompts are therefore above 0 even for "
            "a model that treats all languages alike. `agreement` (PAG) is the share of a prompt's pairs of languages "
            "with the same verdict. It is 1 for a model that is always safe, so `kappa` corrects it for chance "
            "(Fleiss 1971); for such a model kappa is undefined. A share of 0% or 100% has the exact interval of "
            "Clopper and Pearson. An incoherent model can look safe: also read `invalid`, and the refusals of "
            "ordinary prompts."
        ),
    ]


def _texts(study: Study) -> list[Block]:
    """All prompts and responses, if the user asked for them."""
    blocks: list[Block] = [Heading("Texts"), Paragraph("These texts are harmful by design.")]
    if not study.judges:
        return blocks
    for system in study.systems:
        with study.responses(system) as journal:
            responses = journal.records
        verdicts: dict[str, dict[Key, dict[str, Any]]] = {}
        for judge in study.judges:
            with study.verdicts(system, judge.name) as journal:
                verdicts[judge.name] = journal.records
        for key, messages in study.conversations:
            labels = [f"{name}: {found[key]['label']}" for name, found in verdicts.items() if key in found]
            blocks += [
                Heading(f"{system.label}, {key.set}, {key.id}, {key.language}", 3),
                Paragraph(", ".join(labels)),
                Verbatim("\n\n".join(message["content"] for message in messages), key.language),
                Verbatim(responses[key]["response"] if key in responses else "", key.language),
            ]
    return blocks
