"""cli.py export: a weight file from a training checkpoint."""

import argparse
from pathlib import Path

import torch

from equireg.weights import save_weights


def export_command(args: list[str]) -> int:
    """Writes the weights of a checkpoint of ``fit`` as a self-describing safetensors file."""
    parser = argparse.ArgumentParser(prog="cli.py export", description=export_command.__doc__)
    parser.add_argument("checkpoint", type=Path, help="a .ckpt file of DiffusionPriorTraining or AutoencoderTraining")
    parser.add_argument("output", type=Path, help="the .safetensors file to write")
    parser.add_argument("--raw", action="store_true", help="the weights themselves, not their moving average")
    options = parser.parse_args(args)
    if not options.checkpoint.is_file():
        raise FileNotFoundError(f"checkpoint={str(options.checkpoint)!r} does not exist")
    checkpoint = torch.load(options.checkpoint, map_location="cpu", weights_only=True)
    if "description" not in checkpoint:
        raise ValueError(f"checkpoint={str(options.checkpoint)!r} was not written by a training of this library")
    if options.raw and "current_model_state" not in checkpoint:
        raise ValueError(f"checkpoint={str(options.checkpoint)!r} holds no averaged weights: leave --raw out")
    prefix = checkpoint["weights_prefix"]
    weights = checkpoint["current_model_state" if options.raw else "state_dict"]
    state = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    save_weights(options.output, state, checkpoint["description"])
    print(f"{options.output}: {sum(v.numel() for v in state.values()):,} parameters")
    return 0
