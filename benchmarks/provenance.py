"""What a result was made with, and on what: versions, commit, machine."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
PACKAGES = ("s2dm-loss", "torch", "diffusers", "torchmetrics", "scikit-learn")


@cache  # what runs is what was imported, whatever the checkout becomes meanwhile
def versions() -> dict[str, str | bool | None]:
    """Return what a result depends on besides its settings."""
    found: dict[str, str | bool | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    found["commit"] = git("rev-parse", "HEAD") or None
    # Files that git does not know are left out: a run's own folder may be among them.
    found["checkout_differed"] = bool(git("status", "--porcelain", "--untracked-files=no"))
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """Return what times were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    listed = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    named = re.search(r"^model name\s*: (.*\S)", listed, re.MULTILINE)
    facts: dict[str, Any] = {
        "cpu": named[1] if named else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        facts |= {
            "gpu": torch.cuda.get_device_name(device),
            "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "cuda": torch.version.cuda,
        }
    return facts


def git(*arguments: str) -> str:
    """Return what git prints in this repository, or nothing where there is no git."""
    return output("git", "-C", str(ROOT), *arguments)


def output(*command: str) -> str:
    """Return what a command prints, or nothing where there is no such command."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    except FileNotFoundError:
        return ""
    return done.stdout.strip()
