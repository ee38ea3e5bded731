"""The product trains every family of ``architectures.py`` in agreement with the plain reference.

The default round runs a few quick families; the others are slow. With ``FAMILY_RESULTS`` set to a folder, the figures
are saved there, and ``families.table`` writes ``docs/models.md`` from them.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from families.architectures import FAMILIES, PARTS, Family, Part
from families.trial import ADAPTED, SETTINGS, TOLERANCE, make_model, train, trial, write_result

from lightning_mlc.errors import UserError


def _cases(refused: bool) -> list[object]:
    cases = []
    for family in FAMILIES:
        for part in PARTS:
            if (part in family.refused) != refused:
                continue
            marks = [] if family.quick else [pytest.mark.slow]
            if part in family.wrong:
                marks.append(pytest.mark.xfail(strict=True, reason=family.wrong[part]))
            cases.append(pytest.param(family, part, marks=marks, id=f"{family.name}-{part}"))
    return cases


@pytest.mark.parametrize(("family", "part"), _cases(refused=False))
def test_trains_as_the_plain_reference(family: Family, part: Part, tmp_path: Path) -> None:
    result = trial(family, part, tmp_path)
    _keep(family, part, result)
    differences = result["differences"]
    assert {name: value for name, value in differences.items() if not value <= TOLERANCE} == {}
    if part == "weights":
        assert result["export"] == 0, "the exported weights are not those that were trained"
    if part == "adapters":
        assert result["export"] <= ADAPTED


@pytest.mark.parametrize(("family", "part"), _cases(refused=True))
def test_is_refused_in_one_line(family: Family, part: Part, tmp_path: Path) -> None:
    make_model(family, tmp_path)
    with pytest.raises(UserError) as caught:
        train(tmp_path, SETTINGS[part])
    told = str(caught.value)
    assert family.refused[part] in told
    assert "\n" not in told
    _keep(family, part, {"refused": told})


def test_there_are_sixty_architectures() -> None:
    """Names are unique too, because results are saved under them."""
    assert len({family.model_type for family in FAMILIES if not family.refused}) >= 60
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)


def _keep(family: Family, part: Part, result: dict[str, object]) -> None:
    if folder := os.environ.get("FAMILY_RESULTS"):
        write_result(Path(folder), family, part, result)
