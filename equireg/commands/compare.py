"""``cli.py compare``: one table of several runs, joined by sample."""

import argparse
import csv
import io
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from equireg.bootstrap import CONFIDENCE, interval_of_mean
from equireg.runs import Run, atomic_write, read_run

# data_misfit is missing on purpose: a good one is near one with noise, near zero without, which a table cannot know.
HIGHER_IS_BETTER = {
    "psnr": True,
    "ssim": True,
    "ssim_uniform7": True,
    "lpips": False,
    "fid": False,
    "kid": False,
    "nmse": False,
    "relative_l2": False,
    "equivariance_error": False,
    "seconds": False,
    "network_evaluations": False,
}
LEGEND = (
    "Each cell: mean ± standard deviation over the measurements; below it the mean paired difference to the reference "
    f"with its {100 * CONFIDENCE:.0f} % bootstrap interval [low, high]. Several draws from one measurement are "
    "averaged first, because they are not independent. Bold: the best mean."
)


@dataclass(frozen=True)
class Cell:
    """One run and one metric; None where there is no such number.

    Args:
        mean: mean over the measurements.
        std: their standard deviation (n - 1 in the denominator).
        n: number of measurements.
        difference: mean paired difference, this run minus the reference.
        low: lower end of the difference's 95 % interval.
        high: its upper end.
    """

    mean: float
    std: float | None
    n: int
    difference: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Block:
    """Runs that saw the same measurements.

    Args:
        title: what they have in common.
        runs: their names, in the order given.
        reference: the run that the others are subtracted from.
        n: number of measurements that all of them have.
        cells: by run and metric; no entry where the run does not have the metric.
        notes: what was left out, a sentence each.
    """

    title: str
    runs: tuple[str, ...]
    reference: str
    n: int
    cells: dict[tuple[str, str], Cell]
    notes: tuple[str, ...]

    def best(self, metric: str) -> set[str]:
        """The runs with the best mean, as far as the table tells them apart; empty where nothing is better."""
        means = {run: self.cells[run, metric].mean for run in self.runs if (run, metric) in self.cells}
        if metric not in HIGHER_IS_BETTER or not means:
            return set()
        spell = _spelling(list(means.values()))
        best = spell((max if HIGHER_IS_BETTER[metric] else min)(means.values()))
        runs = {run for run, mean in means.items() if spell(mean) == best}
        return set() if len(runs) == len(means) else runs

    def texts(self, metric: str) -> dict[str, tuple[str, str]]:
        """Mean and difference of every run, as a table shows them."""
        cells = {run: self.cells[run, metric] for run in self.runs if (run, metric) in self.cells}
        spell = _spelling([cell.mean for cell in cells.values()])
        texts = dict.fromkeys(self.runs, ("–", ""))
        for run, cell in cells.items():
            mean = spell(cell.mean) if cell.std is None else f"{spell(cell.mean)} ± {spell(cell.std)}"
            difference = "" if cell.difference is None else spell(cell.difference, sign="+")
            if cell.low is not None:
                difference += f" [{spell(cell.low, sign='+')}, {spell(cell.high, sign='+')}]"
            texts[run] = mean, difference
        return texts


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` found, and its three forms.

    Args:
        blocks: one per set of measurements.
        metrics: the columns.
        title: headline.
        command: what makes this table again.
        remarks: sentences below the tables.
    """

    blocks: tuple[Block, ...]
    metrics: tuple[str, ...]
    title: str
    command: str | None
    remarks: tuple[str, ...] = ()

    def csv(self) -> str:
        """One line per block, run and metric, every digit."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["block", "run", "metric", "mean", "std", "n", "difference", "low", "high"])
        for block in self.blocks:
            for (run, metric), c in block.cells.items():
                writer.writerow([block.title, run, metric, c.mean, c.std, c.n, c.difference, c.low, c.high])
        return file.getvalue()

    def markdown(self) -> str:
        """A page with the title, the command and one table per block."""
        parts = [f"# {self.title}"]
        if self.command:
            parts.append(f"```\n{self.command}\n```")
        parts.append(LEGEND)
        for block in self.blocks:
            if len(self.blocks) > 1:
                parts.append(f"## {block.title}")
            parts.append(" ".join([_caption(block), *block.notes]))
            parts.append(self._markdown_table(block))
        if self.remarks:
            parts.append("\n".join(f"- {remark}" for remark in self.remarks))
        return "\n\n".join(parts) + "\n"

    def print(self, console: Console | None = None) -> None:
        """Shows the blocks; where the terminal is narrow, one block becomes several tables of fewer metrics each."""
        console = console or Console()
        console.print(Text(self.title, style="bold"))
        for block in self.blocks:
            widths = {metric: _width(block, metric) for metric in self.metrics if _has(block, metric)}
            longest = max(map(len, ("run", *block.runs)))
            name_width = min(longest, max(console.width - max(widths.values(), default=0) - 4, 6))
            for metrics in _portions(widths, console.width - name_width - 4):  # 4: frame and padding of the names
                title = Text(block.title) if len(self.blocks) > 1 else None
                console.print(_rich_table(block, metrics, title, name_width))
            console.print(Text(" ".join([_caption(block), *block.notes])))
        for remark in self.remarks:
            console.print(Text(remark))
        console.print(Text(LEGEND, style="dim"))

    def write(self, stem: str | Path) -> tuple[Path, Path]:
        """Writes STEM.csv and STEM.md."""
        paths = Path(f"{stem}.csv"), Path(f"{stem}.md")
        for path, content in zip(paths, (self.csv(), self.markdown()), strict=True):
            atomic_write(path, content)
        return paths

    def _markdown_table(self, block: Block) -> str:
        metrics = [metric for metric in self.metrics if _has(block, metric)]
        columns = [["run", "---", *(run.replace("|", "\\|") for run in block.runs)]]
        for metric in metrics:
            texts, best = block.texts(metric), block.best(metric)
            cells = [_markdown_cell(*texts[run], bold=run in best) for run in block.runs]
            columns.append([_with_arrow(metric), "---", *cells])
        return "\n".join("| " + " | ".join(line) + " |" for line in zip(*columns, strict=True))


def compare(
    runs: Sequence[str | Path],
    output: str | Path | None = None,
    names: Sequence[str] | None = None,
    metrics: Sequence[str] | None = None,
    group: bool = False,
    group_names: Sequence[str] | None = None,
    reference: str | None = None,
    title: str | None = None,
    command: str | None = None,
) -> Comparison:
    """Compares finished runs on the samples that they share.

    Args:
        runs: their folders; the first one is the reference of the paired differences.
        output: where to write, without an ending: OUTPUT.csv and OUTPUT.md.
        names: what to call the runs; without it, as much of the end of each path as tells them apart.
        metrics: which to show, in this order; without it, all.
        group: put runs that saw the same measurements into one block each, instead of refusing different measurements.
        group_names: titles of the blocks, in the order of their first runs.
        reference: name of another run to subtract; with ``group``, every block must have a run of this name.
        title: headline.
        command: what to run to make this table again.

    Raises:
        FileNotFoundError: if a run is not there or not finished.
        ValueError: if the runs have no sample in common or, without ``group``, saw different measurements of one; if a
            name or a metric is unknown.
    """
    folders = [Path(run) for run in runs]
    if not folders:
        raise ValueError("there is no run to compare")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError(f"a run is given twice: {', '.join(map(str, folders))}")
    if names is not None and len(names) != len(folders):
        raise ValueError(f"{len(names)} names are given for {len(folders)} runs")
    if group_names is not None and not group:
        raise ValueError("group names need --group")
    read = [read_run(folder) for folder in folders]
    name_of = dict(zip(folders, names or _distinct_tails(folders), strict=True))
    groups = group_by_measurements(read) if group else [read]
    if group_names is not None and len(group_names) != len(groups):
        raise ValueError(f"{len(group_names)} group names are given for {len(groups)} groups: {_spell_out(groups)}")
    titles = group_names or ["all" if len(groups) == 1 else f"group {i + 1}" for i in range(len(groups))]

    known = list(dict.fromkeys(metric for run in read for metric in (*run.columns, *_of_the_whole_run(run))))
    for metric in metrics or ():
        if metric not in known:
            raise ValueError(f"metric={metric!r} is in none of the runs; available: {', '.join(known)}")
    shown = tuple(dict.fromkeys(metrics or known))
    blocks = []
    for members, block_title in zip(groups, titles, strict=True):
        named = {name_of[run.folder]: run for run in members}
        if len(named) < len(members):
            raise ValueError(
                f"two runs of one table have the same name: {', '.join(name_of[r.folder] for r in members)}"
            )
        blocks.append(_block(named, block_title, reference, shown))
    shown = tuple(metric for metric in shown if any(_has(block, metric) for block in blocks))
    comparison = Comparison(tuple(blocks), shown, title or "Comparison of runs", command)
    if output is not None:
        comparison.write(output)
    return comparison


def compare_command(args: list[str]) -> int:
    """``cli.py compare``: shows the table, writes it when asked; the exit code."""
    options = _parser().parse_args(args)
    try:
        comparison = compare(**vars(options), command=shlex.join(["python", "cli.py", "compare", *args]))
    except (ValueError, OSError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    comparison.print()
    return 0


def group_by_measurements(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs that saw the same measurements, in order of appearance.

    A run joins the first group that it shares samples with and whose runs all agree with it on every shared sample.
    """
    groups: list[list[Run]] = []
    for run in runs:
        for group in groups:
            if _shared([*group, run]) and all(_disagreement(member, run) is None for member in group):
                group.append(run)
                break
        else:
            groups.append([run])
    return groups


def _block(named: dict[str, Run], title: str, reference: str | None, metrics: Sequence[str]) -> Block:
    """The numbers of runs that must have seen the same measurements."""
    names = list(named)
    if reference is not None and reference not in named:
        raise ValueError(f"reference={reference!r} is not among the runs {', '.join(names)}")
    for a, b in combinations(names, 2):
        sample = _disagreement(named[a], named[b])
        if sample is not None:
            raise ValueError(
                f"the runs {a} and {b} did not see the same measurement of sample {sample[0]}, draw {sample[1]} "
                f"(--group makes one table per set of measurements)"
            )
    shared = _shared(list(named.values()))
    if not shared:
        raise ValueError(f"the runs {', '.join(names)} have no sample in common")

    reference = reference or names[0]
    n = len({index for index, _ in shared})
    notes, cells = [], {}
    extra = {name: len(run.rows) - len(shared) for name, run in named.items() if len(run.rows) > len(shared)}
    if extra:
        counts = ", ".join(f"{count} of {name}" for name, count in extra.items())
        notes.append(f"Samples left out because not every run has them: {counts}.")
    for metric in metrics:
        values, missing = _values_per_measurement(named, metric, shared)
        if missing:
            counts = ", ".join(f"{count} of {name}" for name, count in missing.items())
            notes.append(f"{metric}: samples left out because they have no value: {counts}.")
        cells |= {(name, metric): _cell(values, name, reference) for name in values}
    whole = {name: _of_the_whole_run(run) for name, run in named.items()}
    for metric in metrics:
        values = {name: numbers[metric] for name, numbers in whole.items() if metric in numbers}
        if values and extra:
            notes.append(f"{metric}: left out because it was computed from all samples of a run.")
        elif values:
            cells |= {(name, metric): _whole_run_cell(values, name, reference, n) for name in values}
    ordered = {(name, metric): cells[name, metric] for name in names for metric in metrics if (name, metric) in cells}
    return Block(title, tuple(names), reference, n, ordered, tuple(notes))


def _values_per_measurement(
    named: dict[str, Run], metric: str, shared: set[tuple[int, int]]
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """A metric of every run that has it, (n,) over the measurements at which all of them have it, draws averaged.

    Also the number of shared samples without a value, of the runs that have some.
    """
    tables = {}
    for name, run in named.items():
        table = {(row.index, row.draw): row.metrics[metric] for row in run.rows if metric in row.metrics}
        tables[name] = {sample: value for sample, value in table.items() if sample in shared}
    tables = {name: table for name, table in tables.items() if table}
    missing = {name: len(shared) - len(table) for name, table in tables.items() if len(table) < len(shared)}
    samples = sorted(shared.intersection(*tables.values()))
    if not samples:
        return {}, missing
    draws: dict[int, list[tuple[int, int]]] = {}
    for sample in samples:
        draws.setdefault(sample[0], []).append(sample)
    return {
        name: np.array([_mean([table[sample] for sample in same]) for same in draws.values()])
        for name, table in tables.items()
    }, missing


def _cell(values: dict[str, np.ndarray], name: str, reference: str) -> Cell:
    """Statistics of one run; an infinite value (the PSNR of equal images) makes the mean infinite, with no interval."""
    own = values[name]
    finite = bool(np.isfinite(own).all())
    mean, std = _mean(own), float(np.std(own, ddof=1)) if finite and len(own) > 1 else None
    if name == reference or reference not in values:
        return Cell(mean, std, len(own))
    differences = np.zeros_like(own)
    np.subtract(own, values[reference], out=differences, where=own != values[reference])  # inf - inf: no difference
    if not np.isfinite(differences).all():
        difference = _mean(differences)
        return Cell(mean, std, len(own), None if math.isnan(difference) else difference)
    low, high = interval_of_mean(differences) or (None, None)
    return Cell(mean, std, len(own), _mean(differences), low, high)


def _whole_run_cell(values: dict[str, float], name: str, reference: str, n: int) -> Cell:
    """A metric that exists once per run, such as FID."""
    if name == reference or reference not in values:
        return Cell(values[name], None, n)
    return Cell(values[name], None, n, values[name] - values[reference])


def _of_the_whole_run(run: Run) -> dict[str, float]:
    """The numbers of ``summary.json`` that are not means of a column."""
    metrics = run.summary.get("metrics", {})
    numbers = {name: value.get("mean") if isinstance(value, dict) else value for name, value in metrics.items()}
    return {
        name: float(value)
        for name, value in numbers.items()
        if name not in run.columns and isinstance(value, int | float) and math.isfinite(value)
    }


def _mean(values: np.ndarray | list[float]) -> float:
    with np.errstate(invalid="ignore"):  # of +inf and -inf
        return float(np.mean(values))


def _shared(runs: Sequence[Run]) -> set[tuple[int, int]]:
    """(index, draw) of the samples that all runs have."""
    return set.intersection(*({(row.index, row.draw) for row in run.rows} for run in runs))


def _disagreement(a: Run, b: Run) -> tuple[int, int] | None:
    """The first shared sample whose measurements differ, or are not known."""
    seen = {(row.index, row.draw): row.measurement for row in a.rows}
    differing = [
        (row.index, row.draw)
        for row in b.rows
        if (row.index, row.draw) in seen and not (row.measurement and row.measurement == seen[row.index, row.draw])
    ]
    return min(differing, default=None)


def _distinct_tails(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths, equally long, that differ."""
    parts = [folder.absolute().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        tails = ["/".join(part[-length:]) for part in parts]
        if len(set(tails)) == len(tails):
            break
    return tails


def _spell_out(groups: Sequence[Sequence[Run]]) -> str:
    return " | ".join(", ".join(str(run.folder) for run in group) for group in groups)


def _has(block: Block, metric: str) -> bool:
    return any((run, metric) in block.cells for run in block.runs)


def _caption(block: Block) -> str:
    reference = f", reference: {block.reference}" if len(block.runs) > 1 else ""
    return f"N = {block.n} measurement{'s' if block.n > 1 else ''}{reference}."


def _with_arrow(metric: str) -> str:
    if metric not in HIGHER_IS_BETTER:
        return metric
    return f"{metric} {'↑' if HIGHER_IS_BETTER[metric] else '↓'}"


def _spelling(means: Sequence[float]) -> Callable[..., str]:
    """A function that writes numbers of a column with these means: four digits of the largest one."""
    largest = max((abs(mean) for mean in means if math.isfinite(mean)), default=1.0)
    digits = 3 - math.floor(math.log10(largest)) if largest > 0 else 2

    def spell(value: float, sign: str = "") -> str:
        if not math.isfinite(value):
            return {"inf": f"{sign}∞", "-inf": "-∞", "nan": "–"}[str(value)]
        if digits > 6 or digits < -3:
            return f"{value:{sign}.3g}"
        return f"{round(value, max(digits, 0)) + 0.0:{sign}.{max(digits, 0)}f}"  # + 0.0: no "-0.00"

    return spell


def _markdown_cell(mean: str, difference: str, bold: bool) -> str:
    if bold:
        number, *spread = mean.split(" ", 1)
        mean = " ".join([f"**{number}**", *spread])
    return f"{mean}<br>{difference}" if difference else mean


def _rich_table(block: Block, metrics: Sequence[str], title: Text | None, name_width: int) -> Table:
    table = Table(title=title, title_justify="left", show_lines=True)
    table.add_column("run", overflow="fold", max_width=name_width)
    columns = []
    for metric in metrics:
        table.add_column(Text(_with_arrow(metric)), justify="right", overflow="fold")
        texts, best = block.texts(metric), block.best(metric)
        columns.append([_rich_cell(*texts[run], bold=run in best) for run in block.runs])
    for run, *cells in zip(block.runs, *columns, strict=True):
        table.add_row(Text(run), *cells)
    return table


def _rich_cell(mean: str, difference: str, bold: bool) -> Text:
    text = Text(mean, style="bold" if bold else "")
    return Text.assemble(text, "\n", difference) if difference else text


def _width(block: Block, metric: str) -> int:
    """Columns of a terminal that a metric takes, with padding and one line of the frame."""
    texts = [text for pair in block.texts(metric).values() for text in pair]
    return max(map(len, [_with_arrow(metric), *texts])) + 3


def _portions(widths: dict[str, int], available: int) -> list[list[str]]:
    """The metrics in portions that are not wider than what is available, where a single metric is not."""
    portions: list[list[str]] = []
    left = 0
    for metric, width in widths.items():
        if not portions or width > left:
            portions.append([])
            left = available
        portions[-1].append(metric)
        left -= width
    return portions


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cli.py compare",
        usage="%(prog)s RUN RUN ... [options]",
        description="One table of finished runs, joined by sample. Runs that saw different measurements are refused.",
        epilog="example: python cli.py compare runs/dps runs/equi_dps --names DPS Equi-DPS --output docs/dps",
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="folder of a finished run; the first one is the reference"
    )
    parser.add_argument("--names", nargs="+", metavar="NAME", help="what to call the runs, one name each")
    parser.add_argument("--metrics", nargs="+", metavar="METRIC", help="which metrics to show; default: all")
    parser.add_argument("--reference", metavar="NAME", help="subtract the run of this name instead of the first one")
    parser.add_argument(
        "--group",
        action="store_true",
        help="one block per set of measurements, each with its own first run as reference",
    )
    parser.add_argument(
        "--group-names",
        "--group_names",
        nargs="+",
        metavar="TITLE",
        help="titles of the blocks, in order of appearance",
    )
    parser.add_argument("--title", help="headline of the table")
    parser.add_argument("--output", metavar="STEM", help="write STEM.csv (every number) and STEM.md (the table)")
    return parser
