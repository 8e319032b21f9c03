"""``cli.py sweep``: a grid of settings as separate resumable runs, then one comparison and the record of the search."""

import argparse
import gc
import json
import math
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from equireg.commands.compare import HIGHER_IS_BETTER, Block, Comparison, compare, group_by_measurements
from equireg.runs import atomic_write, read_run

CONFIG = "config"
EMPTY = "none"
OPENING, CLOSING = "([{", ")]}"


@dataclass(frozen=True)
class Axis:
    """One ``--over``.

    Args:
        key: option of predict, or ``config``.
        short: what run names call it; no two axes of a sweep have the same.
        values: as on the command line.
        labels: the values as run names write them.
    """

    key: str
    short: str
    values: tuple[str, ...]
    labels: tuple[str, ...]


@dataclass
class Setting:
    """One point of the grid.

    Args:
        values: by the axis's short name.
        labels: by the axis's short name, e.g. ``zeta=0.3``.
        folder: of its run.
        arguments: what ``run`` is called with.
        status: "not run", "finished" or "failed".
        error: why it failed.
    """

    values: dict[str, str]
    labels: dict[str, str]
    folder: Path
    arguments: list[str]
    status: str = "not run"
    error: str | None = None

    @property
    def name(self) -> str:
        return ",".join(self.labels.values())


def sweep_command(args: list[str], run: Callable[[list[str]], int | None]) -> int:
    """``cli.py sweep``: runs every setting, compares what finished; exit code 1 when a setting failed.

    Args:
        args: the words after ``sweep``.
        run: the command line itself; ``run(["predict", ...])`` makes one run, or completes it. An exception, an exit or
            an exit code other than zero is a failure.
    """
    options, passed_on = _parser().parse_known_args(args)
    try:
        settings = plan(options.name, options.root, options.config, passed_on, options.over)
        _check_metric(options.metric)
    except ValueError as error:
        print(f"sweep: {error}", file=sys.stderr)
        return 2
    if options.dry_run:
        for setting in settings:
            print(shlex.join(["python", "cli.py", *setting.arguments]))
        return 0

    record = Record(shlex.join(["python", "cli.py", "sweep", *args]), options.metric, settings)
    stem = Path(options.root) / options.name / "sweep"
    for i, setting in enumerate(settings):
        print(f"sweep: {i + 1} of {len(settings)}: {setting.name}", flush=True)
        _perform(setting, run)
        if setting.status == "failed":
            print(f"sweep: {setting.name} failed: {setting.error}", file=sys.stderr, flush=True)
        record.write(stem.with_suffix(".json"))
    record.compare(title=f"Sweep {options.name}", output=stem)
    record.write(stem.with_suffix(".json"))
    if record.comparison:
        record.comparison.print()
    failed = sum(setting.status == "failed" for setting in settings)
    if failed:
        print(f"sweep: {failed} of {len(settings)} settings failed", file=sys.stderr)
    return 1 if failed else 0


def plan(name: str, root: str, configs: Sequence[str], options: Sequence[str], overs: Sequence[str]) -> list[Setting]:
    """The grid, the last axis fastest.

    Args:
        name: the sweep's name; its runs are NAME/SETTING.
        root: folder of all runs.
        configs: files that every run loads first.
        options: other options of predict that every run gets.
        overs: ``key=value,value,...`` each.

    Raises:
        ValueError: if there is nothing to vary, an axis is malformed, a file is missing, or two settings have the same
            name.
    """
    if name in ("", ".", "..") or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"name={name!r} must be the name of a folder below {root}")
    if options and not options[0].startswith("-"):
        raise ValueError(f"{options[0]!r} does not belong to an option")
    axes = _axes(overs)
    axis_files = [file for axis in axes if axis.key == CONFIG for value in axis.values for file in _files(value)]
    for file in (*configs, *axis_files):
        if not Path(file).is_file():
            raise ValueError(f"the configuration file {file} does not exist")
    settings = []
    for points in product(*(tuple(zip(axis.values, axis.labels, strict=True)) for axis in axes)):
        chosen = list(zip(axes, points, strict=True))
        files = [file for axis, (value, _) in chosen if axis.key == CONFIG for file in _files(value)]
        labels = {axis.short: f"{axis.short}={label}" for axis, (_, label) in chosen}
        run_name = f"{name}/{','.join(labels.values())}"
        arguments = ["predict", *(word for file in (*configs, *files) for word in ("-c", file))]
        arguments += ["--name", run_name, "--root", root, *options]
        # One word, so that a value may begin with a minus sign.
        arguments += [f"--{axis.key}={value}" for axis, (value, _) in chosen if axis.key != CONFIG]
        values = {axis.short: value for axis, (value, _) in chosen}
        settings.append(Setting(values, labels, Path(root) / run_name, arguments))
    _check_names(settings)
    return settings


class Record:
    """The search record: ``sweep.json``.

    Args:
        command: what was typed.
        metric: what the best setting is best at.
        settings: all of the grid.
    """

    def __init__(self, command: str, metric: str, settings: list[Setting]) -> None:
        self.command = command
        self.metric = metric
        self.settings = settings
        self.comparison: Comparison | None = None
        self.groups: list[tuple[Block, dict[str, Setting]]] = []

    def compare(self, title: str, output: Path) -> None:
        """One comparison of the finished runs, a block per set of measurements; writes it."""
        finished = {setting.folder: setting for setting in self.settings if setting.status == "finished"}
        if not finished:
            return
        groups = group_by_measurements([read_run(folder) for folder in finished])
        members = [[finished[run.folder] for run in group] for group in groups]
        titles, names = _titles_and_names(members)
        comparison = compare(
            list(finished),
            names=[names[setting.name] for setting in finished.values()],
            group=True,
            group_names=titles,
            title=title,
            command=self.command,
        )
        for block, group in zip(comparison.blocks, members, strict=True):
            self.groups.append((block, {names[setting.name]: setting for setting in group}))
        self.comparison = replace(comparison, remarks=self._remarks())
        self.comparison.write(output)

    def best(self, block: Block) -> str | None:
        """The run of a block with the best mean of the metric; the first of equal ones; None where it is not known."""
        means = {run: block.cells[run, self.metric].mean for run in block.runs if (run, self.metric) in block.cells}
        means = {run: mean for run, mean in means.items() if not math.isnan(mean)}
        pick = max if HIGHER_IS_BETTER[self.metric] else min
        return pick(means, key=means.get) if means else None

    def write(self, path: Path) -> None:
        """Writes the record as it is now: a search that is stopped half-way leaves one, too."""
        means = {
            setting.name: {metric: cell.mean for (run, metric), cell in block.cells.items() if run == shown}
            for block, group in self.groups
            for shown, setting in group.items()
        }
        settings = [
            {
                "name": setting.name,
                "values": setting.values,
                "folder": str(setting.folder),
                "command": shlex.join(["python", "cli.py", *setting.arguments]),
                "status": setting.status,
                "error": setting.error,
                "metrics": means.get(setting.name, {}),
            }
            for setting in self.settings
        ]
        groups = []
        for block, group in self.groups:
            best = self.best(block)
            chosen = {"name": group[best].name, "values": group[best].values} if best else None
            if chosen:
                chosen[self.metric] = block.cells[best, self.metric].mean
            runs = [setting.name for setting in group.values()]
            groups.append({"name": block.title, "n": block.n, "runs": runs, "best": chosen})
        record = {"command": self.command, "metric": self.metric, "settings": settings, "groups": groups}
        atomic_write(path, json.dumps(_finite(record), indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def _remarks(self) -> tuple[str, ...]:
        """The best setting of each block, and what failed."""
        remarks = []
        for block, group in self.groups:
            best = self.best(block)
            found = f"best {self.metric} with {group[best].name}" if best else f"no run measured {self.metric}"
            remarks.append(f"{block.title}: {found}.")
        failed = [setting.name for setting in self.settings if setting.status == "failed"]
        if failed:
            remarks.append(f"{len(failed)} of {len(self.settings)} settings failed: {'; '.join(failed)}.")
        return tuple(remarks)


def _perform(setting: Setting, run: Callable[[list[str]], int | None]) -> None:
    """Makes one run and keeps its status; whatever goes wrong in it must not stop the other settings."""
    setting.status = "failed"
    try:
        code = run(setting.arguments)
        if code:
            setting.error = f"exit {code}"
            return
        read_run(setting.folder)
        setting.status = "finished"
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning turns Ctrl-C into an exit
            raise
        setting.error = f"exit {error.code}"
    except Exception as error:
        setting.error = f"{type(error).__name__}: {error}"
    finally:
        gc.collect()  # a Trainer and its model refer to each other: the next run needs their memory


def _axes(overs: Sequence[str]) -> list[Axis]:
    if not overs:
        raise ValueError("there is nothing to vary: give --over key=value,value,... at least once")
    parsed = []
    for over in overs:
        key, equals, text = over.partition("=")
        key = key.removeprefix("--")
        if not equals or not re.fullmatch(r"[A-Za-z_][\w.-]*", key):
            raise ValueError(f"--over {over!r} must be key=value,value,...")
        if key in ("name", "root"):
            raise ValueError(f"--over {over!r}: the sweep itself sets {key}")
        if key != CONFIG and key in [other for other, _ in parsed]:
            raise ValueError(f"--over {key} is given twice")
        values = split_values(text)
        if key == CONFIG and values == [""]:
            raise ValueError(f"--over {over!r} has no value")
        if key != CONFIG and "" in values:
            raise ValueError(f"--over {over!r} has {'no' if values == [''] else 'an empty'} value")
        parsed.append((key, values))
    shorts = _short_names(parsed)
    return [
        Axis(key, short, tuple(values), tuple(_label(key, value) for value in values))
        for short, (key, values) in zip(shorts, parsed, strict=True)
    ]


def split_values(text: str) -> list[str]:
    """Splits at the commas outside of brackets and double quotes.

    Raises:
        ValueError: if the brackets or quotes do not match.
    """
    values, open_brackets, quoted = [""], [], False
    for character in text:
        if character == '"':
            quoted = not quoted
        elif not quoted and character in OPENING:
            open_brackets.append(character)
        elif not quoted and character in CLOSING:
            if not open_brackets or OPENING.index(open_brackets.pop()) != CLOSING.index(character):
                raise ValueError(f"the brackets of {text!r} do not match")
        elif not quoted and character == "," and not open_brackets:
            values.append("")
            continue
        values[-1] += character
    if open_brackets or quoted:
        raise ValueError(f"the {'quotes' if quoted else 'brackets'} of {text!r} do not match")
    return [value.strip() for value in values]


def _short_names(parsed: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """The last word of each key, or all of it where two would be equal; a config axis is called after its folder."""
    lasts = [_folder_of(values) if key == CONFIG else key.split(".")[-1] for key, values in parsed]
    shorts: list[str] = []
    for last, (key, _) in zip(lasts, parsed, strict=True):
        short = stem = last if key == CONFIG or lasts.count(last) == 1 else key
        number = 2
        while short in shorts:
            short, number = f"{stem}{number}", number + 1
        shorts.append(short)
    return shorts


def _folder_of(values: Sequence[str]) -> str:
    """The name of the folder that all files of a config axis lie in, else "config"."""
    folders = {Path(file).parent.name for value in values for file in _files(value)}
    return folders.pop() or CONFIG if len(folders) == 1 else CONFIG


def _files(value: str) -> list[str]:
    """The configuration files that a value of a config axis names."""
    return [file for file in value.split("+") if file]


def _label(key: str, value: str) -> str:
    """A value as part of a folder's name."""
    if key == CONFIG:
        value = "+".join(Path(file).stem for file in _files(value))
    return re.sub(r"[^\w.+-]+", " ", value).strip().replace(" ", "-") or EMPTY


def _check_names(settings: Sequence[Setting]) -> None:
    seen: dict[str, Setting] = {}
    for setting in settings:
        other = seen.setdefault(setting.name, setting)
        if other is not setting:
            a, b = (", ".join(f"{axis}={value}" for axis, value in s.values.items()) for s in (other, setting))
            raise ValueError(f"the settings ({a}) and ({b}) would have the same name, {setting.name}")
        if len(setting.name.encode()) > 255:
            raise ValueError(
                f"the name {setting.name} is too long for a folder: {len(setting.name.encode())} > 255 bytes"
            )


def _check_metric(metric: str) -> None:
    if metric not in HIGHER_IS_BETTER:
        raise ValueError(f"metric={metric!r} has no best value; available: {', '.join(HIGHER_IS_BETTER)}")


def _titles_and_names(groups: Sequence[Sequence[Setting]]) -> tuple[list[str], dict[str, str]]:
    """Groups are called after the axes that are constant inside each of them, runs after the other axes."""
    axes = list(groups[0][0].labels)
    common = [axis for axis in axes if all(len({s.labels[axis] for s in group}) == 1 for group in groups)]
    common = [axis for axis in common if len({group[0].labels[axis] for group in groups}) > 1]
    titles = [",".join(group[0].labels[axis] for axis in common) for group in groups]
    names = {
        setting.name: ",".join(label for axis, label in setting.labels.items() if axis not in common) or setting.name
        for group in groups
        for setting in group
    }
    if len(groups) == 1:
        return ["all"], names
    if len(set(titles)) < len(titles):
        titles = [f"group {i + 1}: {title}" if title else f"group {i + 1}" for i, title in enumerate(titles)]
    return titles, names


def _finite(value: object) -> object:
    """JSON knows no infinity: written as text."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cli.py sweep",
        usage="%(prog)s --name NAME -c FILE [-c FILE ...] --over KEY=V1,V2 [--over ...] [any option of predict]",
        description=(
            "Runs predict once for every combination of the values, each in a resumable folder ROOT/NAME/SETTING, then "
            "compares the runs that finished: ROOT/NAME/sweep.csv, sweep.md, and the record sweep.json. "
            "Every other option is handed to predict; configuration files are loaded before it."
        ),
        epilog=(
            "example: python cli.py sweep --name tune_dps -c configs/sampler/dps.yaml "
            "--over config=configs/task/sr4.yaml,configs/task/box.yaml --over model.init_args.zeta=0.3,1,3"
        ),
        allow_abbrev=False,
    )
    parser.add_argument("--name", required=True, help="name of the sweep")
    parser.add_argument("--root", default="runs", help="folder of all runs (default: runs)")
    parser.add_argument(
        "-c",
        "--config",
        action="append",
        default=[],
        metavar="FILE",
        help="configuration file of every run; repeatable",
    )
    parser.add_argument(
        "--over",
        action="append",
        default=[],
        metavar="KEY=V1,V2",
        help="one axis of the grid; commas inside brackets or double quotes belong to a value. The key `config` loads "
        "more files after those of -c: FILE+FILE loads several, an empty value none",
    )
    parser.add_argument("--metric", default="psnr", help="what the best setting is best at (default: psnr)")
    parser.add_argument("--dry-run", "--dry_run", action="store_true", help="print the runs, do nothing")
    return parser
