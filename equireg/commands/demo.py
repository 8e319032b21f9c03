"""``cli.py demo``: a photograph and two equations' fields, restored with and without EquiReg; tables and figures."""

import argparse
from collections.abc import Callable
from pathlib import Path

from equireg.commands.demo_fields import restore_fields
from equireg.commands.demo_images import restore_images, write_photograph
from equireg.commands.demo_part import CONFIGS, Part

PARTS = ("images", "fields")


def demo(args: list[str], run: Callable[[list[str]], None]) -> int:
    """Runs the demonstration.

    Args:
        args: command line after ``demo``.
        run: performs one run of ``predict``.

    Raises:
        FileNotFoundError: if the configurations, the pictures or the weights are not there.
        ValueError: if pictures are given and the part that restores them is left out.
    """
    options = _parser().parse_args(args)
    if not CONFIGS.is_dir():
        raise FileNotFoundError(f"{CONFIGS} does not exist; the demonstration runs from a checkout of the repository")
    if options.images and options.only == "fields":
        raise ValueError(f"--images={options.images} is restored by the part images, which --only=fields leaves out")
    only = options.only or ("images" if options.images else None)
    root = Path(options.root)

    def part(name: str, draws: int) -> Part:
        draws = draws if options.draws is None else options.draws
        return Part(name, root, options.num_steps, draws, options.batch_size, run)

    if only != "fields":
        pictures = Path(options.images) if options.images else write_photograph(root / "demo" / "input")
        print(restore_images(part(pictures.name, draws=4), pictures, options.limit))
    if only != "images":
        print(restore_fields(part("equations", draws=2)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cli.py demo", description=__doc__.replace("``", ""))
    parser.add_argument("--only", choices=PARTS, help="one part; with --images, images")
    parser.add_argument("--images", default=None, metavar="FOLDER", help="pictures to degrade and restore")
    parser.add_argument("--root", default="runs", help="folder of all runs")
    parser.add_argument("--num_steps", type=int, default=100, help="diffusion steps")
    parser.add_argument("--draws", type=int, help="posterior draws per measurement; 4 of a picture, 2 of a field")
    parser.add_argument("--limit", type=int, default=4, help="at most this many pictures of the folder")
    parser.add_argument("--batch_size", type=int, default=4, help="draws restored together")
    return parser
