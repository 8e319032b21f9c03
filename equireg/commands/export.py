"""cli.py export: a weight file from a training checkpoint."""

import argparse
from pathlib import Path

import torch

from equireg.weights import save_weights


def export_command(args: list[str]) -> int:
    """Writes the averaged weights of a checkpoint of ``fit`` as a self-describing safetensors file."""
    parser = argparse.ArgumentParser(prog="cli.py export", description=export_command.__doc__)
    parser.add_argument("checkpoint", type=Path, help="a .ckpt file of DiffusionPriorTraining or AutoencoderTraining")
    parser.add_argument("output", type=Path, help="the .safetensors file to write")
    options = parser.parse_args(args)
    if not options.checkpoint.is_file():
        raise FileNotFoundError(f"checkpoint={str(options.checkpoint)!r} does not exist")
    checkpoint = torch.load(options.checkpoint, map_location="cpu", weights_only=True)
    if "description" not in checkpoint:
        raise ValueError(f"checkpoint={str(options.checkpoint)!r} was not written by a training of this library")
    prefix = checkpoint["weights_prefix"]
    state = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    save_weights(options.output, state, checkpoint["description"])
    print(f"{options.output}: {sum(v.numel() for v in state.values()):,} parameters")
    return 0
