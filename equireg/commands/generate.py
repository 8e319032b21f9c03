"""``cli.py generate``: files of input and solution fields of an equation."""

import argparse
from typing import get_args

from equireg.pde.equations import EQUATIONS
from equireg.pde.files import import_fields, read_attributes
from equireg.pde.generate import LAWS, SPLITS, Precision, generate
from equireg.pde.helmholtz import WAVENUMBER
from equireg.pde.navier_stokes import DT, HORIZON, VISCOSITY

LAW_OPTIONS: dict[str, dict[str, tuple[float, str]]] = {
    "navier_stokes": {
        "viscosity": (VISCOSITY, "nu"),
        "horizon": (HORIZON, "time of the final field"),
        "dt": (DT, "time step; the published data have 1e-4, ten times the work for a change of 4e-4"),
        "alpha": (2.5, "smoothness of the initial field"),
        "tau": (7.0, "its inverse length scale"),
    },
    "helmholtz": {
        "wavenumber": (WAVENUMBER, "k"),
        "alpha": (2.0, "smoothness of the source"),
        "tau": (3.0, "its inverse length scale"),
    },
}


def generate_command(args: list[str]) -> int:
    """Writes the files of the splits asked for; what was interrupted goes on where it was."""
    options = _parser().parse_args(args)
    asked = {split: getattr(options, split) for split in SPLITS if getattr(options, split)}
    if options.source:
        if len(options.split) != 1 or asked:
            raise ValueError("--source converts into one file: name its --split, and give no numbers of pairs")
        paths = [
            import_fields(
                options.source, options.folder, options.pde, options.split[0], options.size, options.overwrite
            )
        ]
    else:
        if options.split:
            raise ValueError("--split belongs to --source; say how many pairs with --train, --val and --test")
        if not asked:
            raise ValueError("nothing to generate: say how many pairs with --train, --val and --test")
        constants = {name: getattr(options, name) for name in LAW_OPTIONS[options.pde]}
        law = LAWS[options.pde](options.size, precision=options.precision, **constants)
        paths = [
            generate(
                law, options.folder, split, count, options.seed, options.workers, options.device, options.overwrite
            )
            for split, count in asked.items()
        ]
    for path in paths:
        print(f"{path}: {read_attributes(path).count} pairs of {options.size}x{options.size}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cli.py generate", description=generate_command.__doc__)
    equations = parser.add_subparsers(dest="pde", required=True, metavar="EQUATION")
    for name, constants in LAW_OPTIONS.items():
        equation = equations.add_parser(
            name, help=EQUATIONS[name].title, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        equation.add_argument("--folder", default="data/pde", help="where the files are written")
        equation.add_argument("--size", type=int, default=64, help="points per side")
        for split in SPLITS:
            equation.add_argument(f"--{split}", type=int, default=0, help=f"number of {split} pairs")
        equation.add_argument("--seed", type=int, default=0, help="of all fields; splits are independent of each other")
        equation.add_argument("--workers", type=int, default=1, help="processes; the files do not depend on it")
        equation.add_argument("--device", default="cpu", help="cpu, or cuda for one process on the GPU")
        equation.add_argument(
            "--precision", choices=get_args(Precision), default="float64", help="of the solver; files hold float32"
        )
        equation.add_argument("--overwrite", action="store_true", help="replace files with other settings")
        equation.add_argument(
            "--source",
            nargs="+",
            default=[],
            help="convert published files instead (.mat of DiffusionPDE, folders of DiffusionPDE-normalized)",
        )
        equation.add_argument("--split", nargs=1, default=[], choices=SPLITS, help="what --source is converted into")
        for option, (default, what) in constants.items():
            equation.add_argument(f"--{option}", type=float, default=default, help=what)
    return parser
