"""Write ``docs/models.md`` from the results of a run of the matrix.

From the root of the repository::

    FAMILY_RESULTS=/tmp/families pytest tests/families -m ""
    PYTHONPATH=tests python -m families.table /tmp/families
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from families.architectures import FAMILIES, PARTS, Family, Part

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
HEAD = """# Models

<!-- Written by `python -m families.table`; see CONTRIBUTING.md, "Add a family of models". -->

The tests of this repository train these families of causal LMs, as tiny random models: DPO + MLC, two optimizer steps
on sequences longer than their windows. They compare losses, log-probabilities, hidden states and all gradients with a
simple reference implementation. It runs each sequence alone and without padding through the model of transformers
{version}, in float64 where the family supports it. Each family is trained three times: all weights with the states of
the last layer; all weights in padded rows with the states of a middle layer; LoRA adapters on all linear layers.

- *Rows*: `packed` if several sequences share a row, which is faster; `padded` if packing would change results.
- *Middle layer*: whether `model.consistency.layer` may name a middle layer.
- *Adapted by LoRA*: the modules and weights that `model.lora.target_modules: all-linear` finds.
- *Export*: `same` if the exported and reloaded model gives the logits of the trained model, bit for bit. With merged
  adapters the logits agree up to rounding ({adapted:.0e} of their size at most).
- *Difference*: the largest relative difference of all compared values. Rounding in float32 is 6e-8.

"""
COLUMNS = (
    "| Family | `model_type` | Rows | Middle layer | Adapted by LoRA | Export | Difference |\n" + "|---" * 7 + "|\n"
)

Results = dict[Part, dict[str, Any]]


def read(folder: Path, family: Family) -> Results:
    """Return the results of ``family`` by trained part, for the parts that were run."""
    found: Results = {}
    for part in PARTS:
        path = folder / f"{family.name}.{part}.json".replace("/", "-")
        if path.is_file():
            found[part] = json.loads(path.read_text(encoding="utf-8"))
    return found


def works(family: Family, part: Part) -> bool:
    """Whether the product should train this, and trains it correctly."""
    return part not in family.refused and part not in family.wrong


def row(family: Family, found: Results) -> str:
    """Return the row of ``family`` in the table."""
    differences = [
        value
        for part, result in found.items()
        if works(family, part)
        for value in result.get("differences", {}).values()
    ]

    def cell(part: Part, tell: Callable[[dict[str, Any]], str]) -> str:
        if not works(family, part):
            return "no"
        return tell(found[part]) if "differences" in found.get(part, {}) else "not run"

    cells = [
        family.name,
        f"`{family.model_type}`",
        cell("weights", lambda result: "packed" if result["packed"] else "padded"),
        cell("middle", lambda _: "yes"),
        cell("adapters", lambda result: ", ".join(f"`{name}`" for name in result["adapted"])),
        cell("weights", lambda result: "same" if result["export"] == 0 else "another"),
        f"{max(differences):.0e}" if differences else "",
    ]
    return "| " + " | ".join(cells) + " |\n"


def remarks(family: Family, found: Results) -> list[str]:
    """Return the reasons for refusals, and the known faults, each once."""
    names = {"weights": "whole weights", "middle": "a middle layer", "adapters": "LoRA"}
    told: dict[str, list[str]] = {}
    for part in PARTS:
        if part in family.refused:
            told.setdefault(f"refused: `{found.get(part, {}).get('refused', family.refused[part])}`", []).append(
                names[part]
            )
        elif part in family.wrong:
            told.setdefault(f"wrong today: {family.wrong[part]}", []).append(names[part])
    return [
        f"- **{family.name}**{'' if len(parts) == len(PARTS) else ', ' + ' and '.join(parts)}: {text}\n"
        for text, parts in told.items()
    ]


def page(folder: Path, adapted: float) -> str:
    """Return the text of ``docs/models.md`` from the results in ``folder``."""
    found = {family.name: read(folder, family) for family in FAMILIES}
    trained = [family for family in FAMILIES if any(works(family, part) for part in PARTS)]
    text = HEAD.format(version=transformers.__version__, adapted=adapted) + COLUMNS
    text += "".join(row(family, found[family.name]) for family in trained)
    lines = [line for family in FAMILIES for line in remarks(family, found[family.name])]
    return text + "\n## Known refusals and faults\n\n" + "".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write docs/models.md from the results of tests/families.")
    parser.add_argument("results", type=Path, help="the folder that FAMILY_RESULTS named")
    PAGE.write_text(page(parser.parse_args().results, adapted=1e-5), encoding="utf-8")


if __name__ == "__main__":
    main()
