"""The folder of a run: what it holds, how it is read, how its files are written."""

import csv
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

NOT_METRICS = ("index", "draw", "name", "measurement")
REQUIRED = ("index", "draw", "measurement")


@dataclass(frozen=True)
class Row:
    """One sample of a run: a line of ``metrics.csv``.

    Args:
        index: number of the sample in its data set.
        draw: which of several posterior draws from the same measurement.
        name: the sample's name, for people.
        measurement: hash of what was measured; equal between runs that saw the same measurement of the sample.
        metrics: the numbers that are available; the others, NaN included, are left out.
    """

    index: int
    draw: int
    name: str
    measurement: str
    metrics: dict[str, float]


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        folder: where it lies.
        name: last part of the folder.
        columns: the metrics of ``metrics.csv``, in the order of the file.
        rows: one per sample.
        summary: contents of ``summary.json``, empty when there is none.
    """

    folder: Path
    name: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    summary: dict


def read_run(path: str | Path) -> Run:
    """Reads ``metrics.csv`` and ``summary.json`` of a run's folder.

    Raises:
        FileNotFoundError: if there is no such folder, or the run in it is not finished.
        ValueError: if a file is damaged; the message names the file, the line and the column.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder of a run")
    metrics, summary = folder / "metrics.csv", folder / "summary.json"
    if not metrics.is_file():
        raise FileNotFoundError(f"the run {folder} is not finished: it holds no metrics.csv")
    columns, rows = _read_rows(metrics)
    name = folder.name or folder.resolve().name
    return Run(folder, name, columns, rows, _read_summary(summary) if summary.is_file() else {})


def atomic_write(path: str | Path, content: bytes | str) -> None:
    """Writes a file that is there completely or not at all, also when the process dies; makes the folders above it.

    Args:
        path: the file; an existing one is replaced.
        content: text is written as UTF-8, its line ends as they are.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.parent / f".{uuid4().hex}.tmp"  # not tempfile: its files cannot be read by others
    try:
        with open(aside, "xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _read_rows(path: Path) -> tuple[tuple[str, ...], tuple[Row, ...]]:
    """The metrics' names and the samples of a ``metrics.csv``."""
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns = tuple(reader.fieldnames or ())
        missing = [column for column in REQUIRED if column not in columns]
        if missing:
            raise ValueError(f"{path} has no column {missing[0]!r}")
        metrics = tuple(column for column in columns if column not in NOT_METRICS)
        rows: dict[tuple[int, int], Row] = {}
        for line in reader:
            where = f"{path}, line {reader.line_num}"
            if None in line or None in line.values():
                raise ValueError(f"{where} does not have the {len(columns)} values of the header")
            row = Row(
                index=_number(line["index"], int, "index", where),
                draw=_number(line["draw"], int, "draw", where),
                name=line.get("name", ""),
                measurement=line["measurement"],
                metrics=_available({m: _number(line[m], float, m, where) for m in metrics if line[m].strip()}),
            )
            if (row.index, row.draw) in rows:
                raise ValueError(f"{where} repeats sample {row.index}, draw {row.draw}")
            rows[row.index, row.draw] = row
    if not rows:
        raise ValueError(f"{path} holds no sample")
    return metrics, tuple(rows.values())


def _read_summary(path: Path) -> dict:
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(summary, dict) or not isinstance(summary.get("metrics", {}), dict):
        raise ValueError(f"{path} must hold a JSON object, and another one under 'metrics'")
    return summary


def _number(text: str, kind: type[int] | type[float], column: str, where: str) -> int | float:
    try:
        return kind(text)
    except ValueError:
        what = "an integer" if kind is int else "a number"
        raise ValueError(f"{where}: {column}={text!r} is not {what}") from None


def _available(metrics: dict[str, float]) -> dict[str, float]:
    """Without NaN, which says "not available" as an empty field does."""
    return {metric: value for metric, value in metrics.items() if not math.isnan(value)}
