"""cli.py checkpoint: published weights in this library's format."""

import argparse
from pathlib import Path
from typing import get_args

from equireg.checkpoints.convert_edm import convert_edm_pickle
from equireg.pde.equations import PDE


def checkpoint_command(args: list[str]) -> int:
    """checkpoint convert."""
    parser = argparse.ArgumentParser(
        prog="cli.py checkpoint", description="Published weights in this library's format."
    )
    commands = parser.add_subparsers(required=True, metavar="convert")
    convert = commands.add_parser(
        "convert",
        help="convert a checkpoint of FunDPS or DiffusionPDE",
        description="Reads a .pkl of FunDPS (Zenodo record 18562619) or DiffusionPDE without running anything of it, "
        "and writes its averaged network as safetensors that equireg.priors.EDMPrior loads.",
    )
    convert.add_argument("checkpoint", type=Path, help="the .pkl file")
    convert.add_argument("output", type=Path, help="the .safetensors file to write")
    convert.add_argument("--pde", choices=get_args(PDE), required=True, help="the equation it was trained on")
    options = parser.parse_args(args)
    if options.output.suffix != ".safetensors":
        raise ValueError(f"output={str(options.output)!r} must end in .safetensors")
    prior = convert_edm_pickle(options.checkpoint, options.output, options.pde)
    description, provenance = prior.description, prior.description["provenance"]
    count = sum(p.numel() for p in prior.network.parameters())
    print(
        f"{options.output}: {description['architecture']} of {description['pde']}, {count:,} parameters, "
        f"{provenance['tensors']} tensors, from {provenance['source']} (SHA-256 {provenance['sha256']})"
    )
    return 0
