"""Shards and manifests on disk: complete ones are read, all others are named and computed again."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from lightning_mlc.files.atomic import whole_file
from lightning_mlc.reference.scores import ReferenceScores
from lightning_mlc.reference.store import ScoreStore

PARTS = {"weights": "0123456789abcdef" * 4, "data": "d1", "precision": "32-true"}


def store(root: Path, **changes: str) -> ScoreStore:
    return ScoreStore(root, PARTS | changes, {"model": "tiny"})


def scores(*keys: int) -> ReferenceScores:
    generator = torch.Generator().manual_seed(keys[0])
    logps = -torch.rand(len(keys), 2, 3, generator=generator)
    return ReferenceScores(torch.tensor(keys), logps, torch.ones_like(logps))


def shards(store: ScoreStore) -> list[Path]:
    return sorted(store.folder.glob("*.safetensors"))


def equal(one: ReferenceScores, other: ReferenceScores) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_shards_add_up_and_outlive_the_process(tmp_path: Path) -> None:
    assert len(store(tmp_path).read().keys) == 0
    first, second = scores(1, 4), scores(2, 7)
    for part in (second, first):
        store(tmp_path).append(part)
    assert equal(store(tmp_path).read(), ReferenceScores.union([first, second]))
    manifest = json.loads((store(tmp_path).folder / "manifest.json").read_text())
    assert manifest["parts"] == {"format": "1", **PARTS}
    assert manifest["notes"] == {"model": "tiny"}


def test_any_other_part_is_another_folder(tmp_path: Path) -> None:
    store(tmp_path).append(scores(1))
    for part in PARTS:
        assert len(store(tmp_path, **{part: "else"}).read().keys) == 0
    assert len(store(tmp_path, more="x").read().keys) == 0


@pytest.mark.parametrize("damage", ["a bit", "the end", "all"])
def test_a_damaged_shard_is_named_and_its_rows_are_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    for part in (scores(1, 4), scores(2, 7)):
        store(tmp_path).append(part)
    victim = shards(store(tmp_path))[0]
    content = bytearray(victim.read_bytes())
    if damage == "a bit":
        content[-3] ^= 1
    victim.write_bytes({"a bit": bytes(content), "the end": bytes(content[:-9]), "all": b""}[damage])
    left = store(tmp_path).read()
    assert left.keys.tolist() in ([1, 4], [2, 7])
    assert str(victim) in caplog.text
    assert "damaged" in caplog.text
    assert len(shards(store(tmp_path))) == 1
    caplog.clear()
    store(tmp_path).read()
    assert not caplog.text


def test_half_a_file_is_never_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store(tmp_path).append(scores(1))
    whole = shards(store(tmp_path))[0].read_bytes()
    shard = store(tmp_path).folder / f"{'0' * 32}.safetensors"
    with whole_file(shard) as file:  # as another process, or one that is killed here, leaves it
        file.write(whole[:40])
        file.flush()
        assert store(tmp_path).read().keys.tolist() == [1]
        assert "damaged" not in caplog.text
        assert len([path for path in shard.parent.iterdir() if path.stat().st_size == 40]) == 1


def test_a_shard_of_another_folder_is_not_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store(tmp_path).append(scores(1))
    other = store(tmp_path, weights="others")
    other.append(scores(9))
    for shard in shards(store(tmp_path)):
        shutil.copy(shard, other.folder)
    assert other.read().keys.tolist() == [9]
    assert "damaged" in caplog.text


@pytest.mark.parametrize("manifest", ['{"parts": {"precision": "bf16-mixed"}}', "not json", "[]", None])
def test_a_folder_whose_manifest_says_something_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, manifest: str | None
) -> None:
    here = store(tmp_path)
    here.append(scores(1))
    path = here.folder / "manifest.json"
    if manifest is None:
        path.unlink()
    else:
        path.write_text(manifest)
    assert len(here.read().keys) == 0
    assert "computed again" in caplog.text
    if manifest and "bf16" in manifest:
        assert "precision bf16-mixed there, 32-true here" in caplog.text
    else:
        assert "it has no manifest" in caplog.text
    here.append(scores(1))
    assert here.read().keys.tolist() == [1]


def test_why_the_scores_that_are_there_cannot_be_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store(tmp_path, precision="bf16-mixed").append(scores(1))
    store(tmp_path, precision="bf16-mixed", weights="else").append(scores(1))
    store(tmp_path, data="d2").append(scores(1))
    rank_zero = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    rank_zero.addHandler(caplog.handler)
    try:
        store(tmp_path).explain_absence()
        assert "cannot be used: precision bf16-mixed there, 32-true here" in caplog.text
        assert "weights" not in caplog.text
        caplog.clear()
        store(tmp_path, data="d3").explain_absence()  # nothing belongs to this data
        assert not caplog.text
    finally:
        rank_zero.removeHandler(caplog.handler)
