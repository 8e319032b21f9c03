"""What ``summary.json`` says about a run: statistics of its metrics, and what it was made with."""

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from equireg.bootstrap import interval_of_mean
from equireg.runs import NOT_METRICS

PACKAGES = ("torch", "lightning", "equireg", "diffusers")


def summarize(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean, std (n - 1), n and the bootstrap 95 % interval of the mean, of every numeric column.

    They are taken over the measurements; several posterior draws of one are averaged first: they are not independent.
    What does not exist (a deviation of one value, an interval with infinite ones) is None.
    """
    names = dict.fromkeys(name for row in rows for name in row if name not in NOT_METRICS)
    return {name: statistics for name in names if (statistics := _statistics(_per_measurement(rows, name)))}


def provenance(device: torch.device) -> dict[str, Any]:
    """Versions, git commit (None outside a checkout) and hardware."""
    return {
        "versions": {"python": platform.python_version()} | {package: _version(package) for package in PACKAGES},
        "git_commit": git_commit(),
        "hardware": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "cpu_count": os.cpu_count(),
            "platform": platform.platform(),
        },
    }


def git_commit() -> str | None:
    """Commit of the checkout this package lies in, with "-dirty" when files differ from it; None when it is none."""
    checkout = Path(__file__).parents[1]
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):  # no git, no commit yet, not ours to read
        return None
    return answer.stdout.strip()


def _per_measurement(rows: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """The values (n,) of a column, draws averaged; samples without a value are left out."""
    draws: dict[int, list[float]] = {}
    for row in rows:
        if row.get(name) is not None:
            draws.setdefault(row["index"], []).append(row[name])
    return np.array([np.mean(values) for values in draws.values()], dtype=np.float64)


def _statistics(values: np.ndarray) -> dict[str, Any] | None:
    n = len(values)
    if n == 0:
        return None
    if not np.isfinite(values).all():  # infinite: the PSNR of equal images
        return {"mean": None, "std": None, "n": n, "interval_95": None}
    std = float(values.std(ddof=1)) if n > 1 else None
    return {"mean": float(values.mean()), "std": std, "n": n, "interval_95": interval_of_mean(values)}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
