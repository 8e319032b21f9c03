"""cli.py checkpoint: published weights in this library's format."""

import argparse
from pathlib import Path
from typing import get_args

from equireg.checkpoints.convert_diffusion import convert_torch_file
from equireg.checkpoints.convert_edm import convert_edm_pickle
from equireg.checkpoints.convert_unet import AttentionOrder
from equireg.pde.equations import PDE

DESCRIPTION = """Reads published weights without running anything of the file.

.pkl of FunDPS (Zenodo record 18562619) or DiffusionPDE: OUTPUT is a .safetensors file for equireg.priors.EDMPrior.
.pt of guided diffusion (ffhq_10m.pt, 256x256_diffusion_uncond.pt): OUTPUT is a folder for equireg.priors.VPPrior.
.ckpt of latent diffusion with a VQ autoencoder: OUTPUT is a folder with unet, unet_ema and vqvae, for
equireg.priors.LatentPrior; of an autoencoder alone, a folder for equireg.autoencoder.Autoencoder."""


def checkpoint_command(args: list[str]) -> int:
    """checkpoint convert."""
    parser = argparse.ArgumentParser(
        prog="cli.py checkpoint", description="Published weights in this library's format."
    )
    commands = parser.add_subparsers(required=True, metavar="convert")
    convert = commands.add_parser(
        "convert",
        help="convert a checkpoint of FunDPS, DiffusionPDE, guided or latent diffusion",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    convert.add_argument("checkpoint", type=Path, help="the .pkl, .pt, .pth or .ckpt file")
    convert.add_argument("output", type=Path, help="what to write")
    convert.add_argument("--pde", choices=get_args(PDE), help=".pkl: the equation it was trained on")
    convert.add_argument("--image-size", type=int, default=256, help="side of the images of the training (%(default)s)")
    convert.add_argument(
        "--head-channels", type=int, help="width of an attention head (64 for guided, 32 for latent diffusion)"
    )
    convert.add_argument(
        "--attention-order",
        choices=get_args(AttentionOrder),
        default="legacy",
        help="'new' for networks trained with use_new_attention_order (%(default)s)",
    )
    convert.add_argument("--first-stage", action="store_true", help="of a latent diffusion the autoencoder alone")
    options = parser.parse_args(args)
    if options.checkpoint.suffix == ".pkl":
        _convert_pickle(options.checkpoint, options.output, options.pde)
        return 0
    if options.pde:
        raise ValueError(f"--pde {options.pde} is for .pkl files, checkpoint={str(options.checkpoint)!r} is none")
    converted = convert_torch_file(
        options.checkpoint,
        options.output,
        options.image_size,
        options.head_channels,
        options.attention_order,
        options.first_stage,
    )
    for network in converted:
        print(f"{network.folder}: {network.network}, {network.parameters:,} parameters")
    return 0


def _convert_pickle(checkpoint: Path, output: Path, pde: PDE | None) -> None:
    if pde is None:
        raise ValueError("--pde is missing: the equation that the .pkl was trained on, which it does not tell")
    if output.suffix != ".safetensors":
        raise ValueError(f"output={str(output)!r} must end in .safetensors")
    prior = convert_edm_pickle(checkpoint, output, pde)
    description, provenance = prior.description, prior.description["provenance"]
    count = sum(p.numel() for p in prior.network.parameters())
    print(
        f"{output}: {description['architecture']} of {description['pde']}, {count:,} parameters, "
        f"{provenance['tensors']} tensors, from {provenance['source']} (SHA-256 {provenance['sha256']})"
    )
