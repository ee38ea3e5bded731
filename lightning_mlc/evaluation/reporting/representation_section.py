"""The section of a report about hidden states: how close a prompt's translations are, and what states cluster by."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_mlc.evaluation.reporting.cells import file_name, number_cell
from lightning_mlc.evaluation.reporting.document import Block, Heading, Paragraph, Picture, Table
from lightning_mlc.evaluation.reporting.plots import plot_heatmaps, plot_layers, plot_spectra
from lightning_mlc.report import save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WAYS = ("raw", "centred")


def representation_section(results: Mapping[str, Any], plots: Path) -> list[Block]:
    """The section, or nothing if no prompt has two languages.

    Args:
        results: The content of ``results.json``.
        plots: Folder for the pictures.
    """
    models = {model: own for model, own in results["representations"].items() if own["prompts"]}
    if not models:
        return []
    blocks: list[Block] = [
        Heading("Hidden states at the end of the prompt"),
        Paragraph(
            "Each prompt's hidden states in all languages, at every layer. Raw states share a large common direction, "
            "which makes all of them look consistent. For centred states, the mean over prompts and languages is "
            "subtracted. Where the centred curve is low, the model keeps its languages apart. The consistency term "
            "acts on the layer that `model.consistency.layer` names (see docs/consistency.md)."
        ),
        _layer_table(models),
        *_silhouette_blocks(models),
    ]
    for name, (figure, caption) in _pictures(models).items():
        path = plots / f"states-{file_name(name)}.png"
        save(figure, path)
        blocks.append(Picture(path, caption))
    return blocks


def _pictures(models: Mapping[str, Any]) -> dict[str, tuple[Figure, str]]:
    """Figures with their captions, by file name."""
    curves = {model: {way: own[way]["explained_variance"] for way in WAYS} for model, own in models.items()}
    smallest = {model: {way: own[way]["min_cosine"] for way in WAYS} for model, own in models.items()}
    found = {
        "variance": (
            plot_layers(curves, "explained variance", "How much of a prompt's translations lies on one line"),
            "Explained variance of the first direction at every layer",
        ),
        "cosine": (
            plot_layers(smallest, "smallest cosine", "The two translations of a prompt that are furthest apart"),
            "Smallest cosine between two languages at every layer",
        ),
    }
    silhouettes = {
        model: {"by prompt": own["silhouettes"]["by_prompt"], "by language": own["silhouettes"]["by_language"]}
        for model, own in models.items()
    }
    found["silhouettes"] = (
        plot_layers(silhouettes, "silhouette", "Whether hidden states cluster by prompt or by language"),
        "Silhouettes of the centred states by prompt and by language at every layer",
    )
    spectra = {}
    for model, own in models.items():
        middle, last = len(own["raw"]["spectrum"]) // 2, len(own["raw"]["spectrum"]) - 1
        for layer in (middle, last):
            spectra[f"{model}, layer {layer}, centred"] = own["centred"]["spectrum"][layer]
        if "extracted" in own:
            spectra[f"{model}, extracted from layer {own['extracted']['layer']}"] = own["extracted"]["spectrum"][0]
        panels = {f"layer {layer}, {way}": own[way]["cosines"][layer] for layer in (middle, last) for way in WAYS}
        title = f"{model}: cosine between the hidden states of a prompt in two languages"
        found[f"cosines-{model}"] = plot_heatmaps(panels, own["languages"], title), title
    found["spectra"] = (
        plot_spectra(spectra, "Spectrum of a prompt's translations"),
        "Mean share of each squared singular value",
    )
    return found


def _silhouette_blocks(models: Mapping[str, Any]) -> list[Block]:
    rows = []
    for model, own in models.items():
        found = own["silhouettes"]
        last = len(found["by_prompt"]) - 1
        cells = [_silhouette_cell(found, layer) for layer in (found["layer"], last)]
        rows.append([model, "none" if found["layer"] is None else f"{found['layer']} of {last}", *cells])
    return [
        Paragraph(
            "Do the states of a prompt's translations cluster together (by prompt), or those of a language, whatever "
            "the prompt (by language)? Silhouettes are from -1 to 1, of the centred states with cosine distances. "
            "`model.consistency.layer: auto` would take the layer with the largest difference of the two, without "
            "layer 0; of equal ones the last (see docs/consistency.md)."
        ),
        Table(
            ["", "layer that auto would take", "there", "last layer"],
            rows,
            "Silhouette by prompt - by language = difference",
        ),
    ]


def _silhouette_cell(found: Mapping[str, Any], layer: int | None) -> str:
    """``0.412 - 0.103 = 0.309``: the silhouettes at a layer, and their difference."""
    if layer is None:
        return "undefined"
    prompt, language = found["by_prompt"][layer], found["by_language"][layer]
    if prompt is None or language is None:
        return "undefined"
    return f"{prompt:.3f} - {language:.3f} = {prompt - language:.3f}".replace("- -", "+ ")


def _layer_table(models: Mapping[str, Any]) -> Table:
    rows = []
    for model, own in models.items():
        last = len(own["raw"]["explained_variance"]) - 1
        centred = [(v, layer) for layer, v in enumerate(own["centred"]["explained_variance"]) if v is not None]
        ends = (max(centred, default=(0, 0)), min(centred, default=(0, 0)))
        extracted = own.get("extracted")
        rows.append(
            [
                model,
                str(own["prompts"]),
                number_cell(own["raw"]["explained_variance"][last]),
                number_cell(own["centred"]["explained_variance"][last]),
                *(f"layer {layer}: {value:.3f}" if centred else "undefined" for value, layer in ends),
                "-"
                if extracted is None
                else f"layer {extracted['layer']}: {number_cell(extracted['explained_variance'][0])}",
            ]
        )
    columns = ["", "prompts", "last layer", "last, centred", "highest, centred", "lowest, centred", "extracted"]
    return Table(columns, rows, "Explained variance (1: all languages on one line)")
