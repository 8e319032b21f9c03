"""The only entry point: Lightning's fit, validate, test and predict, and a few plain commands."""

import inspect
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import equireg  # noqa: F401  its guard must run before lightning is imported

# isort: split
import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer import Trainer

import callbacks  # noqa: F401  imported so that short class names resolve
import datamodules  # noqa: F401
import lightning_modules
from equireg.commands.checkpoint import checkpoint_command
from equireg.commands.compare import compare_command
from equireg.commands.export import export_command
from equireg.commands.generate import generate_command
from equireg.commands.matrix import matrix_command
from equireg.commands.sweep import sweep_command
from equireg.runs import atomic_write

warnings.filterwarnings("ignore", ".*treespec, LeafSpec.*")  # between lightning and torch, not the user's

HELP = """\
EquiReg: equivariance-regularised diffusion for inverse problems.

An experiment is data x sampler x prior x task x regulariser, one small file each, in this order:

  python cli.py predict -c configs/data/faces64.yaml -c configs/sampler/faces64/dps_super_resolution.yaml
                        -c configs/prior/faces64.yaml -c configs/task/faces64/super_resolution.yaml
                        -c configs/equireg/faces64/dps_super_resolution.yaml

Lightning commands
  predict   restore measurements with a posterior sampler        results in runs/<name>/
  fit       train a prior, an autoencoder, ...                   checkpoints in runs/<name>/
  validate  validate what was trained
  test      test what was trained (denoising error against the linear bar, equivariance error, ...)

Other commands
  demo      restore a photograph under four tasks and two equations' fields, with and without EquiReg
  compare   one table from several runs, with paired differences and 95 % intervals
  sweep     a grid of settings as resumable runs, then one table
  matrix    which sampler restores which measurements, and what attaches to it
  export    a weight file from a training checkpoint
  generate  fields of the Navier-Stokes or Helmholtz equation
  checkpoint convert  published weights in this library's format, without running their code
  data pack a folder of pictures into one HDF5 file

`python cli.py COMMAND --help` shows a command's options; `python cli.py predict --model.help lightning_modules.DPS`
those of a class (also --data.help, --trainer.callbacks.help). `--print_config` shows the merged configuration.
"""

RECORDERS = ("callbacks.TensorBoardInspector", "callbacks.PredictionWriter", "callbacks.StepProgressBar")
"""Callbacks that every predict run has; a configuration that names one sets its options.

The writer reports diverged samples by an error at the very end: the inspector must have closed before.
"""


NOISE = re.compile(
    r"^(Does not validate against|Subtypes: |Errors:|Given value|Expected a <class 'NoneType'>|Expected a path but |"
    r"Not a valid subclass of Callback|Subclass types expect|a class path \(str\)|a dict with)"
)
"""What jsonargparse says about the ways in which a value was not understood, beside the one that matters."""


def one_sentence(message: str) -> str:
    """What is wrong, out of jsonargparse's report on everything it tried."""
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    told = " ".join(dict.fromkeys(line for line in lines if line and not NOISE.match(line)))
    unknown = re.search(r"module '([\w.]+)' has no attribute '(\w+)'", told)
    if unknown is None or unknown[1] not in sys.modules:
        return told
    names = getattr(sys.modules[unknown[1]], "__all__", [])
    return f"{unknown[1]}.{unknown[2]} is unknown; available: {', '.join(sorted(names))}"


class Parser(LightningArgumentParser):
    """Says what is wrong in one sentence."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        print(f"error: {one_sentence(message)}\n(--help shows the options)", file=sys.stderr)
        sys.exit(2)


class RunRecord(SaveConfigCallback):
    """Keeps the resolved configuration in the run folder, and refuses a folder that holds another experiment."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        path = Path(trainer.log_dir) / self.config_filename  # log_dir is a broadcast: every rank asks
        if stage == "predict" and path.is_file():
            different = differences(yaml.safe_load(path.read_text()), yaml.safe_load(self._dump()))
            if different:
                raise ValueError(
                    f"{path.parent} holds another configuration ({'; '.join(different[:3])}); choose another --name "
                    "or delete the folder"
                )
        trainer.strategy.barrier("run_record")  # nobody may still be reading when rank zero writes
        if trainer.is_global_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, self._dump())

    def _dump(self) -> str:
        return self.parser.dump(self.config, skip_none=False)


class EquiRegCLI(LightningCLI):
    """LightningCLI with a named run folder and the recording callbacks."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The command asked for alone: building the parsers of the others takes longer than many runs."""
        every = LightningCLI.subcommands()
        return {name: skipped for name, skipped in every.items() if name == sys.argv[1]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--name",
            type=str | None,
            default=None,
            help="name of the run folder; the names of the -c files when left out",
        )
        parser.add_argument("--root", type=str, default="runs", help="folder of all runs")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        super().parse_arguments(parser, args)
        subcommand = self.config.subcommand
        config = self.config[subcommand]
        config.name = config.name or _name_of([Path(str(file)) for file in config.config or []])
        if subcommand == "predict":
            config.return_predictions = False  # every process would keep all its outputs in memory
            config.trainer.enable_checkpointing = False
            given = config.trainer.callbacks or []
            given = given if isinstance(given, list) else [given]
            present = {callback.class_path for callback in given}
            config.trainer.callbacks = given + [
                Namespace(class_path=path, init_args=Namespace()) for path in RECORDERS if path not in present
            ]

    def after_instantiate_classes(self) -> None:
        kind = type(self.model).__name__
        if isinstance(self.model, lightning_modules.PosteriorSampler) != (self.subcommand == "predict"):
            if self.subcommand == "predict":
                raise ValueError(f"{kind} is a training: run it with `fit`, `validate` or `test`, not `predict`")
            raise ValueError(f"{kind} is a sampler: run it with `predict`, not `{self.subcommand}`")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.config[self.subcommand]
        if config.trainer.logger in (None, True):  # not part of the configuration: name and root say it all
            kwargs["logger"] = TensorBoardLogger(config.root, config.name, version="", default_hp_metric=False)
        return super().instantiate_trainer(**kwargs)


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Settings in which two resolved configurations describe different results, as "key: old -> new"."""
    old_settings, new_settings = (dict(_flatten(_identity(config))) for config in (old, new))
    return [
        f"{key}: {old_settings.get(key)!r} there, {new_settings.get(key)!r} asked"
        for key in sorted(old_settings.keys() | new_settings.keys())
        if old_settings.get(key) != new_settings.get(key)
    ]


def _identity(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a configuration that determines the results: not devices, batches, bars or folders."""
    data = dict(config.get("data") or {})
    data["init_args"] = {
        key: value for key, value in (data.get("init_args") or {}).items() if key not in ("batch_size", "num_workers")
    }
    trainer = config.get("trainer") or {}
    regularisers = [c for c in trainer.get("callbacks") or [] if c["class_path"] not in RECORDERS]
    return {
        "model": config.get("model"),
        "data": data,
        "callbacks": regularisers,
        "precision": trainer.get("precision") or "32-true",
    }


def _flatten(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [pair for key, inner in items for pair in _flatten(inner, f"{prefix}.{key}" if prefix else str(key))]
    return [(prefix, value)]


def _name_of(files: list[Path]) -> str:
    """A run's name from its configuration files: their folders say nothing new, a shared suffix is not repeated."""
    return "-".join(dict.fromkeys(file.stem for file in files if file.stem != "base")) or "run"


def lightning_command(args: list[str]) -> None:
    """fit, validate, test and predict."""
    argv = sys.argv
    sys.argv = [argv[0], *args]  # what Lightning parses, and what it starts further processes with
    try:
        EquiRegCLI(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            parser_class=Parser,
            save_config_callback=RunRecord,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            # inference mode forbids guidance gradients; our data modules share the data between processes themselves,
            # without the repeats of Lightning's sampler
            trainer_defaults={"inference_mode": False, "use_distributed_sampler": False},
        )
    finally:
        sys.argv = argv


def data_command(args: list[str]) -> int:
    """data pack."""
    from datamodules.pack import pack_command

    if args[:1] != ["pack"]:
        print("usage: cli.py data pack --help")
        return 2
    return pack_command(args[1:])


def samplers() -> list[type[lightning_modules.PosteriorSampler]]:
    """Every sampler that ``predict`` runs."""
    kinds = [getattr(lightning_modules, name) for name in lightning_modules.__all__]
    return [k for k in kinds if issubclass(k, lightning_modules.PosteriorSampler) and not inspect.isabstract(k)]


def demo_command(args: list[str]) -> int:
    """demo; its photograph and its figures come from optional packages."""
    from equireg.commands.demo import demo

    return demo(args, run=lightning_command)


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "compare": compare_command,
    "sweep": lambda args: sweep_command(args, run=lightning_command),
    "demo": demo_command,
    "matrix": lambda args: matrix_command(args, samplers()),
    "export": export_command,
    "generate": generate_command,
    "checkpoint": checkpoint_command,
    "data": data_command,
    **dict.fromkeys(("fit", "validate", "test", "predict"), None),
}


def main(args: list[str] | None = None) -> int:
    """Runs one command; returns the exit code.

    A mistake of the user (a missing file, a value out of range) is one sentence; EQUIREG_TRACEBACK=1 shows where it was
    found.
    """
    args = sys.argv[1:] if args is None else args
    if not args or args[0] in ("-h", "--help"):
        print(HELP)
        return 0 if args else 2
    if args[0] not in COMMANDS:
        print(f"error: command {args[0]!r} is unknown; available: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        command = COMMANDS[args[0]]
        return (command(args[1:]) if command else lightning_command(args)) or 0
    except (ValueError, OSError, RuntimeError, ImportError, MisconfigurationException) as error:
        if os.environ.get("EQUIREG_TRACEBACK") == "1":
            raise
        print(f"error: {one_sentence(str(error))}\n(EQUIREG_TRACEBACK=1 shows where)", file=sys.stderr)
        return 1


def entry_point() -> None:
    """The console script."""
    sys.exit(main())


if __name__ == "__main__":
    entry_point()
