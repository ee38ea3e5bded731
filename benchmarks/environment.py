"""The device, versions and commit of a measurement. Every file of results has them."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
"""Root of the repository."""
PACKAGES = ("torch", "triton", "transformers", "lightning", "lightning-mlc", "numpy", "trl")


def environment(device: torch.device) -> dict[str, str | int | None]:
    """Return device, driver, versions and commit, as values for JSON."""
    found: dict[str, str | int | None] = {
        "device": device_name(device),
        "driver": _driver() if device.type == "cuda" else None,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "commit": commit(),
    }
    return found | {package: _version(package) for package in PACKAGES}


def device_name(device: torch.device) -> str:
    """Return the device's name as its driver or the system reports it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    for line in _lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """Return the measured commit, with ``-dirty`` if tracked files differ from it.

    ``GIT_COMMIT`` in the environment takes precedence: a copy of the tree without this history can name the commit
    that it was copied from.
    """
    if commit_of_copy := os.environ.get("GIT_COMMIT"):
        return commit_of_copy
    command = ["git", "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None  # nvidia-smi does not exist on ROCm and in some containers


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
