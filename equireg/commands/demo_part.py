"""What the parts of the demonstration share: runs of two samplers on the same problems, their table, their pictures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from equireg.commands.compare import compare
from equireg.runs import read_run

CONFIGS = Path(__file__).parents[2] / "configs"

Runs = dict[tuple[str, str], Path]
"""Folders of runs by problem and sampler, both as people call them."""


@dataclass(frozen=True)
class Part:
    """A part of the demonstration.

    Args:
        name: of its folder.
        root: folder of all runs.
        num_steps: diffusion steps.
        draws: posterior draws per measurement.
        batch_size: draws restored together.
        run: performs one run of ``predict``.
    """

    name: str
    root: Path
    num_steps: int
    draws: int
    batch_size: int
    run: Callable[[list[str]], None]

    @property
    def folder(self) -> Path:
        """Where everything is left."""
        return self.root / "demo" / self.name

    def predict(self, title: str, name: str, configs: Sequence[str], data: Sequence[str]) -> Path:
        """One run, or what is missing of it; its folder.

        Args:
            title: what is said before it.
            name: of its folder in that of the part.
            configs: files below ``configs/``, without their ending.
            data: options of the data.
        """
        print(f"\n{title}", flush=True)
        files = [argument for config in configs for argument in ("-c", str(CONFIGS / f"{config}.yaml"))]
        counts = [f"--data.draws={self.draws}", f"--data.batch_size={self.batch_size}", "--data.num_workers=0"]
        steps = f"--model.num_steps={self.num_steps}"
        self.run(["predict", *files, *data, *counts, steps, f"--root={self.root}", f"--name=demo/{self.name}/{name}"])
        return self.folder / name

    def tabulate(self, runs: Runs, metrics: Sequence[str], title: str) -> None:
        """Shows a table with a block per problem and writes it as ``table.csv`` and ``table.md``."""
        comparison = compare(
            list(runs.values()),
            names=[sampler for _, sampler in runs],
            metrics=metrics,
            group=True,
            group_names=list(dict.fromkeys(problem for problem, _ in runs)),
            title=f"{title}, {self.draws} draws of {self.num_steps} steps each",
        )
        comparison.print()
        comparison.write(self.folder / "table")


def mean_over_draws(run: Path, metric: str, index: int) -> float:
    """A metric of one measurement of a run."""
    return float(np.mean([row.metrics[metric] for row in read_run(run).rows if row.index == index]))


def panels(titles: Sequence[str], rows: Sequence[str], size: tuple[float, float]) -> tuple[Figure, np.ndarray]:
    """A figure and its axes (rows, titles) without ticks; ``size`` is the width and height of one of them in inches."""
    figure = Figure(figsize=(size[0] * len(titles), size[1] * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(titles))
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title)
    for axis, row in zip(axes[:, 0], rows, strict=True):
        axis.set_ylabel(row)
    return figure, axes
