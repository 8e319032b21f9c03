"""The VQ first stage of latent diffusion (Rombach et al., CVPR 2022) as diffusers' VQModel."""

import re
from typing import Any

from torch import Tensor

RENAMED = (
    (r"\.down\.(\d+)\.block\.(\d+)\.", r".down_blocks.\1.resnets.\2."),
    (r"\.down\.(\d+)\.attn\.(\d+)\.", r".down_blocks.\1.attentions.\2."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d+)\.block\.(\d+)\.", r".up_blocks.\1.resnets.\2."),
    (r"\.up\.(\d+)\.attn\.(\d+)\.", r".up_blocks.\1.attentions.\2."),
    (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(\.attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
)


def convert_vq(state: dict[str, Tensor], image_size: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Arguments of VQModel, and its tensors by diffusers' names.

    Args:
        state: tensors by their official names, without a prefix; those of a training loss are left out.
        image_size: side of the images of the training.

    Raises:
        ValueError: if it is another network.
    """
    state = {name: value for name, value in state.items() if not name.startswith("loss.")}
    if "quantize.embedding.weight" not in state:
        raise ValueError(
            "it is no VQ autoencoder: it has no codebook; diffusers' folders of KL ones are read as they are"
        )
    try:
        config = _config(state, image_size)
    except KeyError as error:
        raise ValueError(f"it is another network: the tensor {error.args[0]!r} is missing") from error
    levels = len(config["block_out_channels"])
    return config, {_rename(name, levels): _matrix(name, value) for name, value in state.items()}


def _config(state: dict[str, Tensor], image_size: int) -> dict[str, Any]:
    def count(prefix: str) -> int:
        return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})

    levels = count("encoder.down.")
    widths = [len(state[f"encoder.down.{level}.block.0.conv2.weight"]) for level in range(levels)]
    attends = [f"encoder.down.{level}.attn.0.q.weight" in state for level in range(levels)]
    codes, code_width = state["quantize.embedding.weight"].shape
    return {
        "sample_size": image_size,
        "in_channels": state["encoder.conv_in.weight"].shape[1],
        "out_channels": len(state["decoder.conv_out.weight"]),
        "down_block_types": [f"{'Attn' if a else ''}DownEncoderBlock2D" for a in attends],
        "up_block_types": [f"{'Attn' if a else ''}UpDecoderBlock2D" for a in reversed(attends)],
        "block_out_channels": widths,
        "layers_per_block": count("encoder.down.0.block."),
        "latent_channels": len(state["encoder.conv_out.weight"]),
        "num_vq_embeddings": codes,
        "vq_embed_dim": code_width,
        "norm_num_groups": 32,
        "norm_type": "group",
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in state,
        "scaling_factor": 1.0,
    }


def _rename(name: str, levels: int) -> str:
    for pattern, ours in RENAMED:
        name = re.sub(pattern, ours, name)
    # the decoder's levels are counted from the full resolution there, from the coarsest here
    return re.sub(r"(?<=^decoder\.up_blocks\.)\d+", lambda found: str(levels - 1 - int(found[0])), name)


def _matrix(name: str, value: Tensor) -> Tensor:
    """The 1x1 convolutions of attention as the matrices they are."""
    return value.flatten(1) if ".attn" in name and value.ndim == 4 else value
