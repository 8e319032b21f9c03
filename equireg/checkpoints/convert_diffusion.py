"""Published networks of guided and latent diffusion as diffusers folders, which priors and autoencoders read."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from diffusers import ModelMixin, UNet2DModel, VQModel
from torch import Tensor

from equireg.checkpoints.convert_edm import sha256
from equireg.checkpoints.convert_unet import AttentionOrder, convert_unet
from equireg.checkpoints.convert_vq import convert_vq
from equireg.checkpoints.torch_file import read_torch_file
from equireg.weights import load_state

UNET, AVERAGED, FIRST_STAGE = "model.diffusion_model.", "model_ema.", "first_stage_model."

HEAD_CHANNELS = {"adm": 64, "ldm": 32}
"""Widths of an attention head in the published networks; the tensors do not tell them."""


@dataclass(frozen=True)
class Converted:
    """A diffusers folder that was written.

    Attributes:
        folder: where.
        network: name of diffusers' class.
        parameters: their number.
    """

    folder: Path
    network: str
    parameters: int


def convert_torch_file(
    source: str | Path,
    output: str | Path,
    image_size: int = 256,
    head_channels: int | None = None,
    attention_order: AttentionOrder = "legacy",
    first_stage: bool = False,
) -> list[Converted]:
    """Writes what a published .pt or .ckpt holds, in full precision, each folder with a provenance.json.

    A network of guided diffusion, or an autoencoder alone, becomes the folder ``output``. A latent diffusion becomes
    ``output/unet``, ``output/unet_ema`` where it has averaged weights too, and ``output/vqvae``.

    Args:
        source: the file.
        output: a folder that does not exist yet.
        image_size: side of the images of the training.
        head_channels: width of an attention head; that of the published networks when left out, 64 for guided
            diffusion and 32 for latent diffusion.
        attention_order: see ``convert_unet``.
        first_stage: of a latent diffusion, the autoencoder alone, as the folder ``output``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is refused, holds other networks, or ``output`` exists; nothing has been written then.
    """
    source, output = Path(source), Path(output)
    if output.exists():
        raise ValueError(f"output={str(output)!r} exists already; nothing is overwritten")
    state = read_torch_file(source)
    try:
        networks = _networks(state, image_size, head_channels, attention_order, first_stage)
    except ValueError as error:
        raise ValueError(f"checkpoint={str(source)!r}: {error}") from error
    provenance = {"source": source.name, "sha256": sha256(source), "image_size": image_size}
    if "scale_factor" in state:
        provenance["scale_factor"] = state["scale_factor"].item()
    aside = output.with_name(f".{output.name}.{uuid4().hex}.tmp")
    try:
        for name, network in networks.items():
            network.save_pretrained(aside / name, safe_serialization=True)
            (aside / name / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
        output.parent.mkdir(parents=True, exist_ok=True)
        os.replace(aside, output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return [
        Converted(output / name, type(network).__name__, sum(p.numel() for p in network.parameters()))
        for name, network in networks.items()
    ]


def _networks(
    state: dict[str, Tensor], image_size: int, head_channels: int | None, order: AttentionOrder, first_stage: bool
) -> dict[str, ModelMixin]:
    """The networks in a state, by the folder inside the output."""
    prefix = FIRST_STAGE if any(name.startswith(FIRST_STAGE) for name in state) else ""
    alone = f"{prefix}encoder.conv_in.weight" in state and not any(name.startswith(UNET) for name in state)
    if first_stage or alone:
        if f"{prefix}encoder.conv_in.weight" not in state:
            raise ValueError("it holds no autoencoder")
        return {"": build(VQModel, *convert_vq(_part(state, prefix), image_size))}
    raw = _part(state, UNET)
    if not raw:
        return {"": build(UNet2DModel, *convert_unet(state, image_size, head_channels or HEAD_CHANNELS["adm"], order))}
    autoencoder = build(VQModel, *convert_vq(_part(state, FIRST_STAGE), image_size))
    side = image_size // 2 ** (len(autoencoder.config.block_out_channels) - 1)
    networks = {"unet": raw}
    averaged = {name: _averaged(state, name) for name in raw}
    if None not in averaged.values():
        networks["unet_ema"] = averaged
    heads = head_channels or HEAD_CHANNELS["ldm"]
    unets = {name: build(UNet2DModel, *convert_unet(part, side, heads, order)) for name, part in networks.items()}
    return unets | {"vqvae": autoencoder}


def build(cls: type[ModelMixin], config: dict[str, Any], state: dict[str, Tensor]) -> ModelMixin:
    """The network with exactly these tensors, in float32."""
    network = cls(**config)
    load_state(network, {name: value.float() for name, value in state.items()}, cls.__name__)
    return network


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _averaged(state: dict[str, Tensor], name: str) -> Tensor | None:
    """The averaged weight of a raw one: latent diffusion drops the dots of its name."""
    return state.get(AVERAGED + f"diffusion_model.{name}".replace(".", ""))
