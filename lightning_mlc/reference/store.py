"""Reference scores on disk: shards that are written completely or not at all, and a manifest of their dependencies."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from safetensors import torch as safetensors

from lightning_mlc.files.atomic import write_whole
from lightning_mlc.reference.scores import ReferenceScores

FORMAT = "1"
"""Increase it when the content of a shard, or the way scores are computed, changes."""

SAME_RESPONSES = ("data", "languages")
"""The parts that say which responses are scored."""

logger = logging.getLogger("lightning_mlc")


class ScoreStore:
    """The folder ``root/FINGERPRINT`` of scores that depend on ``parts`` and on nothing else.

    The name of a shard is a hash of the fingerprint and of the shard's bytes. So a shard that is damaged, incomplete or
    from another folder is recognised, and its scores count as missing.

    Args:
        root: The folder of all such folders.
        parts: Descriptions of everything that the scores depend on, by a name that is used in messages.
        notes: Further entries of the manifest.
    """

    def __init__(self, root: Path, parts: Mapping[str, str], notes: Mapping[str, str]) -> None:
        self._parts = {"format": FORMAT, **parts}
        self._notes = dict(notes)
        self._fingerprint = hashlib.sha256(json.dumps(self._parts, sort_keys=True).encode()).hexdigest()[:32]
        self.folder = root / self._fingerprint

    def read(self) -> ReferenceScores:
        """Read all scores. Files that do not belong there are removed, with a warning."""
        if not self.folder.is_dir():
            return ReferenceScores.union([])
        if differences := self._differences(self.folder):
            logger.warning(
                "the reference scores in %s do not match the name of the folder; they are computed again: %s",
                self.folder,
                "; ".join(differences),
            )
            for path in (*self.folder.glob("*.safetensors"), self.folder / "manifest.json"):
                path.unlink(missing_ok=True)
        found = []
        for path in sorted(self.folder.glob("*.safetensors")):
            content = path.read_bytes()
            if path.stem != self._name(content):
                logger.warning("the shard %s of reference scores is damaged; they are computed again", path)
                path.unlink(missing_ok=True)
                continue
            found.append(ReferenceScores(**safetensors.load(content)))
        return ReferenceScores.union(found)

    def append(self, scores: ReferenceScores) -> None:
        """Write ``scores`` as a new shard."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "manifest.json").exists():
            manifest = {"parts": self._parts, "notes": self._notes}
            write_whole(self.folder / "manifest.json", json.dumps(manifest, indent=2))
        content = safetensors.save({name: tensor.contiguous() for name, tensor in scores._asdict().items()})
        write_whole(self.folder / f"{self._name(content)}.safetensors", content)

    def explain_absence(self) -> None:
        """Log how these scores differ from the most similar stored scores of the same responses, if any exist."""
        similar = []
        for folder in self.folder.parent.glob("*/"):
            parts = _manifest(folder).get("parts", {})
            if folder != self.folder and all(parts.get(name) == self._parts.get(name) for name in SAME_RESPONSES):
                similar.append((self._differences(folder), folder))
        if similar:
            differences, folder = min(similar, key=lambda pair: len(pair[0]))
            rank_zero_info(f"the reference scores in {folder} cannot be used: {'; '.join(differences)}")

    def _differences(self, folder: Path) -> list[str]:
        theirs = _manifest(folder).get("parts")
        if not isinstance(theirs, dict):
            return ["it has no manifest"]
        return [
            f"{name} {_short(theirs.get(name))} there, {_short(self._parts.get(name))} here"
            for name in sorted({*theirs, *self._parts})
            if theirs.get(name) != self._parts.get(name)
        ]

    def _name(self, content: bytes) -> str:
        return hashlib.sha256(self._fingerprint.encode() + content).hexdigest()[:32]


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}..."
