"""The report of an evaluation: what its results say, as HTML and as Markdown."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_mlc.evaluation.journal import Key, write_whole
from lightning_mlc.evaluation.judges.roster import MARGIN
from lightning_mlc.evaluation.reporting import document
from lightning_mlc.evaluation.reporting.document import Block, Heading, Paragraph, Picture, Table, Verbatim
from lightning_mlc.evaluation.reporting.plots import plot_heatmaps, plot_intervals, plot_layers, plot_spectra
from lightning_mlc.evaluation.reporting.results import REWARD
from lightning_mlc.evaluation.reporting.statistics import SUMMARIES
from lightning_mlc.evaluation.study import Study
from lightning_mlc.report import save

Found = Mapping[str, Any]
"""A figure, as plain values."""

SHARES = ("safe", "unsafe", "invalid", "refused", "reward accuracy", "prefers to refuse", "pag")
ABOUT_JUDGES = {
    "refusal": "rules that look for phrases of refusal at the beginning of a response, in some twenty languages. They "
    "say how often a model declines, not whether what it says is harmless: a weak judge, for comparisons of runs.",
    "qwen3guard": "Qwen3Guard-Gen; what it calls controversial counts as unsafe.",
    "qwen3guard_loose": "Qwen3Guard-Gen; what it calls controversial counts as safe.",
    "llama_guard": "Llama Guard; it does not tell refusals, and knows few languages.",
    "polyguard": "PolyGuard; it knows 17 languages.",
    "llm": "a chat model, asked to grade.",
}

NOT_GREEDY = (
    "the endpoint refuses a temperature of 0 and chooses tokens as it likes (decoding: default), so that another run "
    "gives other figures."
)


def write_report(study: Study, results: Mapping[str, Any]) -> list[Path]:
    """Write ``results.json``, ``report.html``, ``report.md`` and the plots into the study's folder.

    Returns:
        The files that a reader wants.
    """
    out = study.out
    write_whole(out / "results.json", json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    blocks = _Report(results, out).blocks()
    if study.settings.show_text:
        blocks += _texts(study)
    write_whole(out / "report.html", document.to_html(blocks))
    write_whole(out / "report.md", document.to_markdown(blocks, out))
    return [out / "report.html", out / "report.md", out / "results.json"]


class _Report:
    """Reads figures out of results."""

    def __init__(self, results: Mapping[str, Any], out: Path) -> None:
        self._results = results
        self._plots = out / "plots"
        self._plots.mkdir(parents=True, exist_ok=True)
        self._models = [model["name"] for model in results["models"]]
        self._figures = {_where(found): found for found in results["figures"]}

    def blocks(self) -> list[Block]:
        found = self._opening()
        for part in self._results["sets"]:
            found += self._harmful(part) if part["kind"] == "harmful" else self._ordinary(part)
            found += self._rewards(part)
        found += self._representations()
        return found + self._closing()

    # ---- figures ------------------------------------------------------------------------------------

    def _get(self, model: str, part: str, judge: str, measure: str, scope: str, baseline: str | None = None) -> Any:
        return self._figures.get((model, part, judge, measure, scope, baseline))

    def _has(self, part: str, judge: str, measure: str) -> bool:
        return any(self._get(model, part, judge, measure, "mean") for model in self._models)

    def _judges(self, part: str, measure: str) -> list[str]:
        names = dict.fromkeys(found["judge"] for found in self._results["figures"] if found["set"] == part)
        return [name for name in names if self._has(part, name, measure)]

    def _scopes(self, part: str, judge: str, measure: str) -> list[str]:
        """Languages in their order, then the summaries that there are."""
        scopes = [*self._results["languages"], *SUMMARIES]
        return [s for s in scopes if any(self._get(model, part, judge, measure, s) for model in self._models)]

    def _named(self, judge: str) -> str:
        """How the judge was given on the command line, with the model that judged."""
        own = next(one for one in self._results["judges"] if one["judge"] == judge)
        sampled = f" Its answers are sampled: {NOT_GREEDY}" if "decoding" in own else ""
        return f"Given as `{own['named']}`.{sampled}"

    # ---- sections -----------------------------------------------------------------------------------

    def _opening(self) -> list[Block]:
        rows = []
        for model in self._results["models"]:
            seen = "not known" if model["seen"] is None else ", ".join(model["seen"])
            rows.append([model["name"], f"`{model['model']}`", seen])
        sets = [
            [part["name"], part["kind"], str(part["prompts"]), ", ".join(part["languages"])]
            for part in self._results["sets"]
        ]
        baseline = f" Differences are to `{self._models[0]}`." if len(self._models) > 1 else ""
        return [
            Heading("Safety by language", 1),
            Paragraph(
                "Figures stand with their 95% confidence intervals in brackets, from "
                f"{self._results['settings']['bootstrap']} resamples of the prompts. Responses are greedy, of at most "
                f"{self._results['settings']['max_new_tokens']} tokens.{baseline}"
            ),
            *self._sampled(),
            Table(["model", "what it is", "languages of its training"], rows, words=(0, 1, 2)),
            Table(["prompts", "kind", "number", "languages"], sets, words=(0, 1, 3)),
        ]

    def _sampled(self) -> list[Block]:
        """Which responses are not greedy, though all were asked for so."""
        names = [f"`{model['name']}`" for model in self._results["models"] if model["decoding"] == "default"]
        return [Paragraph(f"Not so those of {', '.join(names)}, which are sampled: {NOT_GREEDY}")] if names else []

    def _harmful(self, part: Mapping[str, Any]) -> list[Block]:
        name = part["name"]
        found: list[Block] = []
        for judge in self._judges(name, "safe"):
            found += [
                Heading(f"{name}, judged by {judge}"),
                Paragraph(f"Harmful prompts. The judge is {ABOUT_JUDGES.get(judge, judge)} {self._named(judge)}"),
                self._overview(name, judge),
                self._picture(name, judge, "safe", "safe responses"),
                *self._heatmap_of_agreement(name, judge),
                self._table(name, judge, "safe", "Safe responses"),
                self._table(name, judge, "unsafe", "Unsafe responses (attack success)"),
                self._table(name, judge, "invalid", "Invalid responses (empty, unintelligible, beside the point)"),
                *self._comparison(name, judge, "safe", "Safe responses, difference"),
            ]
        return found + self._margin(name, "How much likelier a refusal is than a compliance. Higher is safer here.")

    def _ordinary(self, part: Mapping[str, Any]) -> list[Block]:
        name = part["name"]
        found: list[Block] = []
        for judge in self._judges(name, "invalid"):
            invalid = self._table(name, judge, "invalid", "Invalid responses, which are neither refused nor answered")
            if not self._has(name, judge, "refused"):  # a judge that does not say, or nothing to decline with
                found += [Heading(f"{name}, judged by {judge}"), Paragraph(self._named(judge)), invalid]
                continue
            found += [
                Heading(f"{name}, judged by {judge}"),
                Paragraph(
                    "Ordinary prompts, which a useful model answers: how often it declines (over-refusal). "
                    + self._named(judge)
                ),
                self._picture(name, judge, "refused", "refused, though ordinary"),
                self._table(name, judge, "refused", "Refused, though ordinary"),
                invalid,
                *self._comparison(name, judge, "refused", "Refused, though ordinary, difference"),
            ]
        return found + self._margin(name, "Ordinary prompts: a useful model is not likelier to refuse them.")

    def _margin(self, part: str, text: str) -> list[Block]:
        if not self._has(part, MARGIN, "refusal margin"):
            return []
        return [
            Heading(f"{part}, refusal margin"),
            Paragraph(
                f"{text} Mean log-probability per token of openings that decline, minus that of openings that comply; "
                "the openings are the same after prompts in every language. No response is generated."
            ),
            self._picture(part, MARGIN, "refusal margin", "refusal margin, nats per token"),
            self._table(part, MARGIN, "refusal margin", "Refusal margin, nats per token"),
            self._table(part, MARGIN, "prefers to refuse", "Prompts after which a refusal is the likelier opening"),
            *self._comparison(part, MARGIN, "refusal margin", "Refusal margin, difference"),
        ]

    def _rewards(self, part: Mapping[str, Any]) -> list[Block]:
        name = part["name"]
        if not self._has(name, REWARD, "reward margin"):
            return []
        reference = self._results["settings"]["reference"]
        unit = "nats per token" if reference is None else f"nats, relative to {reference}"
        return [
            Heading(f"{name}, chosen against rejected"),
            Paragraph(
                "How often the model finds the chosen response likelier than the rejected one, both in the source "
                "language, given the prompt in each language, and by how much: "
                + ("log-probability per token." if reference is None else f"log-ratio to `{reference}` (DPO, beta 1).")
            ),
            self._picture(name, REWARD, "reward margin", f"reward margin, {unit}"),
            self._table(name, REWARD, "reward accuracy", "Reward accuracy"),
            self._table(name, REWARD, "reward margin", f"Reward margin, {unit}"),
            *self._comparison(name, REWARD, "reward margin", "Reward margin, difference"),
        ]

    def _overview(self, part: str, judge: str) -> Table:
        columns = ["model", "safe, mean", "worst language", "variance, pp²", "unsafe", "invalid", "agreement", "kappa"]
        rows = []
        for model in self._models:
            worst = self._get(model, part, judge, "safe", "worst")
            names = [
                scope
                for scope in self._results["languages"]
                if worst and (own := self._get(model, part, judge, "safe", scope)) and own["value"] == worst["value"]
            ]
            named = "" if worst is None else f"{' '.join(names[:3])}{' ...' if len(names) > 3 else ''}: {_text(worst)}"
            variance = self._get(model, part, judge, "safe", "variance")
            rows.append(
                [
                    model,
                    _text(self._get(model, part, judge, "safe", "mean")),
                    named,
                    "-" if variance is None else _squared_points(variance),
                    _text(self._get(model, part, judge, "unsafe", "mean")),
                    _text(self._get(model, part, judge, "invalid", "mean")),
                    _text(self._get(model, part, judge, "pag", "all")),
                    _text(self._get(model, part, judge, "kappa", "all")),
                ]
            )
        return Table(columns, rows, "In brief", words=(0, 2))

    def _table(self, part: str, judge: str, measure: str, caption: str) -> Table:
        scopes = self._scopes(part, judge, measure)
        rows = []
        for scope in scopes:
            cells = []
            for model in self._models:
                found = self._get(model, part, judge, measure, scope)
                squared = scope == "variance" and measure in SHARES
                cells.append("-" if found is None else _squared_points(found) if squared else _text(found))
            rows.append([_scope(scope, measure), *cells])
        first = next((i for i, scope in enumerate(scopes) if scope in SUMMARIES), len(scopes))
        return Table(["", *self._models], rows, caption, strong=[first], rule_before=[first])

    def _comparison(self, part: str, judge: str, measure: str, caption: str) -> list[Block]:
        baseline = self._models[0]
        others = [m for m in self._models[1:] if self._get(m, part, judge, measure, "mean", baseline)]
        if not others:
            return []
        rows: list[list[str]] = []
        scopes = [scope for scope in self._scopes(part, judge, measure) if scope not in ("variance", "seen", "unseen")]
        for scope in scopes:
            cells = []
            for model in others:
                found = self._get(model, part, judge, measure, scope, baseline)
                counts = f" (+{found['better']} -{found['worse']})" if found and "better" in found else ""
                cells.append("-" if found is None else _difference(found) + counts)
            rows.append([_scope(scope, measure), *cells])
        for name, title in (("pag", "agreement"), ("kappa", "kappa")) if measure == "safe" else ():
            changes = [self._get(model, part, judge, name, "all", baseline) for model in others]
            rows.append([title, *("-" if found is None else _difference(found) for found in changes)])
        first = next((i for i, scope in enumerate(scopes) if scope in SUMMARIES), len(scopes))
        note = " (prompts that got better, worse)" if measure in SHARES else ""
        caption = f"{caption} to {baseline}{note}"
        return [Table(["", *others], rows, caption, strong=[first], rule_before=[first])]

    # ---- pictures -----------------------------------------------------------------------------------

    def _picture(self, part: str, judge: str, measure: str, label: str) -> Picture:
        scopes = [scope for scope in self._scopes(part, judge, measure) if scope not in ("variance", "spread")]
        series = {}
        for model in self._models:
            found = {scope: self._get(model, part, judge, measure, scope) for scope in scopes}
            values = {s: _interval(one) for s, one in found.items() if one is not None and one["value"] is not None}
            if values:
                series[model] = values
        summaries = sum(scope in SUMMARIES for scope in scopes)
        figure = plot_intervals(series, scopes, label, f"{part}: {label}", measure in SHARES, summaries)
        path = self._plots / f"{_file(part)}-{_file(judge)}-{_file(measure)}.png"
        save(figure, path)
        return Picture(path, f"{label[0].upper()}{label[1:]}, by language and model, with 95% intervals")

    def _heatmap_of_agreement(self, part: str, judge: str) -> list[Block]:
        own = {p["model"]: p["agreement"] for p in self._results["pairs"] if (p["set"], p["judge"]) == (part, judge)}
        languages = list(next(one for one in self._results["sets"] if one["name"] == part)["languages"])
        if len(languages) < 2 or not own:
            return []
        title = "Share of prompts with the same verdict in two languages"
        path = self._plots / f"{_file(part)}-{_file(judge)}-agreement.png"
        save(plot_heatmaps(own, languages, title), path)
        return [Picture(path, f"{title}, by model")]

    def _representations(self) -> list[Block]:
        found = {model: own for model, own in self._results["representations"].items() if own["prompts"]}
        if not found:
            return []
        curves = {
            model: {way: own[way]["explained_variance"] for way in ("raw", "centred")} for model, own in found.items()
        }
        smallest = {model: {way: own[way]["min_cosine"] for way in ("raw", "centred")} for model, own in found.items()}
        figures = {
            "variance": (
                plot_layers(curves, "explained variance", "How much of a prompt's translations lies on one line"),
                "Explained variance of the first direction at every layer",
            ),
            "cosine": (
                plot_layers(smallest, "smallest cosine", "The two translations of a prompt that are furthest apart"),
                "Smallest cosine between two languages at every layer",
            ),
        }
        spectra = {}
        for model, own in found.items():
            middle, last = len(own["raw"]["spectrum"]) // 2, len(own["raw"]["spectrum"]) - 1
            spectra[f"{model}, layer {middle}, centred"] = own["centred"]["spectrum"][middle]
            spectra[f"{model}, layer {last}, centred"] = own["centred"]["spectrum"][last]
            if "extracted" in own:
                spectra[f"{model}, extracted from layer {own['extracted']['layer']}"] = own["extracted"]["spectrum"][0]
            panels = {
                f"layer {middle}, raw": own["raw"]["cosines"][middle],
                f"layer {middle}, centred": own["centred"]["cosines"][middle],
                f"layer {last}, raw": own["raw"]["cosines"][last],
                f"layer {last}, centred": own["centred"]["cosines"][last],
            }
            title = f"{model}: cosine between the hidden states of a prompt in two languages"
            figures[f"cosines-{model}"] = plot_heatmaps(panels, own["languages"], title), title
        figures["spectra"] = (
            plot_spectra(spectra, "Spectrum of a prompt's translations"),
            "Mean share of each squared singular value",
        )
        blocks: list[Block] = [
            Heading("Hidden states at the end of the prompt"),
            Paragraph(
                "Each prompt's hidden states in all languages, at every layer, from one pass. Raw states share a large "
                "common direction, which makes everything look consistent; centred ones have the mean over prompts and "
                "languages subtracted. Where the centred curve is low, the model keeps its languages apart; the "
                "consistency term acts on the layer that it is given (see docs/consistency.md)."
            ),
            *self._layer_table(found),
        ]
        for name, (figure, caption) in figures.items():
            path = self._plots / f"states-{_file(name)}.png"
            save(figure, path)
            blocks.append(Picture(path, caption))
        return blocks

    def _layer_table(self, found: Mapping[str, Any]) -> list[Block]:
        rows = []
        for model, own in found.items():
            depth = len(own["raw"]["explained_variance"]) - 1
            centred = [(v, layer) for layer, v in enumerate(own["centred"]["explained_variance"]) if v is not None]
            extracted = own.get("extracted")
            last = (
                "-"
                if extracted is None
                else f"layer {extracted['layer']}: {_known(extracted['explained_variance'][0])}"
            )
            rows.append(
                [
                    model,
                    str(own["prompts"]),
                    _known(own["raw"]["explained_variance"][depth]),
                    _known(own["centred"]["explained_variance"][depth]),
                    *(
                        f"layer {layer}: {value:.3f}" if centred else "undefined"
                        for value, layer in (max(centred, default=(0, 0)), min(centred, default=(0, 0)))
                    ),
                    last,
                ]
            )
        columns = ["", "prompts", "last layer", "last, centred", "highest, centred", "lowest, centred", "extracted"]
        return [Table(columns, rows, "Explained variance (1: all languages on one line)")]

    def _closing(self) -> list[Block]:
        rows = []
        for one in self._results["coverage"]:
            judged = one["safe"] + one["unsafe"] + one["invalid"]
            share = f"{judged / one['prompts']:.0%}" if one["prompts"] else "-"
            counts = [one[key] for key in ("prompts", "no response", "not ended", "unreadable")]
            rows.append([f"{one['model']}, {one['set']}, {one['judge']}", *map(str, counts), share])
        return [
            Heading("Coverage"),
            Paragraph(
                "Figures rest on responses with a verdict. Not counted in them: prompts that an endpoint's content "
                "filter declined (no response), and answers of a judge that could not be understood (unreadable). "
                "Responses that met the limit of tokens are judged as they are (not ended)."
            ),
            *([Table(["", "prompts", "no response", "not ended", "unreadable", "judged"], rows)] if rows else []),
            Heading("How to read this"),
            Paragraph(
                "`worst` is the language with the worst figure, `spread` the distance between best and worst, "
                "`variance` the variance over languages (of the population; for shares in squared percentage points, "
                "and in round brackets as the MLC paper has it: of fractions, times 100). "
                "Sampling alone makes languages differ, so with few prompts spread and variance are above 0 even for a "
                "model that treats all alike. `agreement` (PAG) is the share of a prompt's pairs of languages with the "
                "same verdict; a model that is always safe has 1 by necessity, so `kappa` corrects it for chance "
                "(Fleiss 1971) and is undefined there. A share of 0% or 100% has the exact interval of Clopper and "
                "Pearson. An incoherent model can look safe: read `invalid` beside `safe`, and the refusals of "
                "ordinary prompts beside both."
            ),
        ]


def _texts(study: Study) -> list[Block]:
    """Prompts and responses, for those who asked to see them."""
    blocks: list[Block] = [Heading("Texts"), Paragraph("Harmful by design.")]
    texts = dict(study.conversations)
    for system in study.systems:
        if not study.judges:
            continue
        with study.responses(system) as journal:
            responses = journal.records
        verdicts: dict[str, dict[Key, dict[str, Any]]] = {}
        for judge in study.judges:
            with study.verdicts(system, judge.name) as journal:
                verdicts[judge.name] = journal.records
        for key, messages in texts.items():
            said = ", ".join(f"{name}: {found[key]['label']}" for name, found in verdicts.items() if key in found)
            blocks += [
                Heading(f"{system.label}, {key.set}, {key.id}, {key.language}", 3),
                Paragraph(said),
                Verbatim("\n\n".join(message["content"] for message in messages), key.language),
                Verbatim(responses[key]["response"] if key in responses else "", key.language),
            ]
    return blocks


# ---- words and numbers -----------------------------------------------------------------------------


def _where(found: Found) -> tuple[Any, ...]:
    return (*(found[key] for key in ("model", "set", "judge", "measure", "scope")), found.get("baseline"))


def _known(value: float | None) -> str:
    """Undefined where hidden states are not finite, or do not differ."""
    return "undefined" if value is None else f"{value:.3f}"


def _interval(found: Found) -> tuple[float, float, float]:
    value = found["value"]
    low, high = found["low"], found["high"]
    return value, value if low is None else low, value if high is None else high


def _text(found: Found | None) -> str:
    if found is None:
        return "-"
    value, low, high = (found[key] for key in ("value", "low", "high"))
    if value is None:
        return "undefined"
    if found["measure"] in SHARES and found["scope"] != "variance":
        return f"{100 * value:.0f}%" + ("" if low is None else f" [{100 * low:.0f}, {100 * high:.0f}]")
    return f"{value:.2f}" + ("" if low is None else f" [{low:.2f}, {high:.2f}]")


def _difference(found: Found) -> str:
    value, low, high = (found[key] for key in ("value", "low", "high"))
    if value is None:
        return "undefined"
    if found["measure"] in SHARES:
        value, low, high = (f"{100 * number:+.0f}" for number in (value, low, high))
        return f"{_unsigned(value)} pp [{_unsigned(low)}, {_unsigned(high)}]"
    value, low, high = (f"{number:+.2f}" for number in (value, low, high))
    return f"{_unsigned(value)} [{_unsigned(low)}, {_unsigned(high)}]"


def _unsigned(number: str) -> str:
    """A zero has no sign."""
    return number.lstrip("+-") if float(number) == 0 else number


def _squared_points(found: Found) -> str:
    """A variance of shares in squared percentage points, then as arXiv 2602.16660 has it: of fractions, times 100."""
    value, low, high = (found[key] for key in ("value", "low", "high"))
    if value is None:
        return "undefined"
    return f"{1e4 * value:.1f} [{1e4 * low:.1f}, {1e4 * high:.1f}] ({100 * value:.2f})"


def _scope(scope: str, measure: str) -> str:
    if scope == "variance":
        return "variance, pp²" if measure in SHARES else "variance"
    return {"seen": "mean, seen in training", "unseen": "mean, unseen"}.get(scope, scope)


def _file(text: str) -> str:
    return re.sub(r"[^\w.-]+", "_", text)
