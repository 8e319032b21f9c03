"""The U-Net of guided diffusion (ADM) and of unconditional latent diffusion as diffusers' UNet2DModel.

Both are one design (Dhariwal and Nichol, NeurIPS 2021; Rombach et al., CVPR 2022). Its shape is read off the tensors:
only the width of an attention head and the side of the images are not in them.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any, Literal

from torch import Tensor

AttentionOrder = Literal["legacy", "new"]

PARTS = ("weight", "bias")

RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def convert_unet(
    state: dict[str, Tensor], image_size: int, head_channels: int, attention_order: AttentionOrder = "legacy"
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Arguments of UNet2DModel, and its tensors by diffusers' names.

    Args:
        state: tensors by their official names, without a prefix.
        image_size: side of the images, or latents, of the training.
        head_channels: width of an attention head: 64 in ADM's networks, 32 in latent diffusion's.
        attention_order: how the rows of qkv lie: ``legacy`` head by head, in every published network; ``new`` the
            queries first.

    Raises:
        ValueError: if it is another network, or its attention has no whole number of heads.
    """
    layout = _Layout(state)
    if any(width % head_channels for width in layout.attention_widths()):
        widths = sorted(layout.attention_widths())
        raise ValueError(f"head_channels={head_channels} must divide the widths of the attention, {widths}")
    converted = {}
    left = dict(state)
    for official, ours, kind in layout.pairs():
        for name, value in _block(left, official, kind, head_channels, attention_order):
            converted[f"{ours}.{name}" if name else ours] = value
    if left:
        raise ValueError(f"it is another network: {len(left)} tensors have no place, {sorted(left)[0]!r} among them")
    return layout.config(image_size, head_channels), converted


class _Layout:
    """The shape of the official network: levels from the full resolution down, n residual blocks on each."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state
        if any("transformer_blocks" in name for name in state):
            raise ValueError("it is conditional (cross-attention); diffusers' own folders of it are read as they are")
        try:
            self._measure()
        except KeyError as error:
            raise ValueError(f"it is another network: the tensor {error.args[0]!r} is missing") from error

    def _measure(self) -> None:
        numbers = [int(name.split(".")[1]) for name in self.state if name.startswith("output_blocks.")]
        depth = max(numbers, default=-1) + 1
        self.ups = {u: where for u in range(depth) if (where := self._upsampler(u))}
        self.per_level = min(self.ups) + 1 if self.ups else max(depth, 1)  # n + 1
        self.levels = depth // self.per_level
        ends = [u * self.per_level - 1 for u in range(1, self.levels)]
        if not self.levels or depth % self.per_level or list(self.ups) != ends:
            raise ValueError("it is another network: its levels do not have equally many blocks")
        self.first = [f"input_blocks.{1 + level * self.per_level}" for level in range(self.levels)]
        self.widths = [len(self.state[f"{first}.0.out_layers.3.weight"]) for first in self.first]
        self.attends = [f"{first}.1.qkv.weight" in self.state for first in self.first]
        self.residual_sampling = any(f"{where}.in_layers.0.weight" in self.state for where in self.ups.values())
        self.scale_shift = len(self.state[f"{self.first[0]}.0.emb_layers.1.weight"]) == 2 * self.widths[0]
        self.channels = self.state["input_blocks.0.0.weight"].shape[1]
        self.out_channels = len(self.state["out.2.weight"])
        self.classes = len(self.state["label_emb.weight"]) if "label_emb.weight" in self.state else None
        if self.state["time_embed.0.weight"].shape[1] != self.widths[0]:
            raise ValueError("UNet2DModel cannot express a first level that is not as wide as the time embedding")

    def _upsampler(self, block: int) -> str | None:
        """Prefix of the enlargement at the end of an output block, after its attention where it has one."""
        for position, part in product((1, 2), ("conv.weight", "in_layers.0.weight")):
            if f"output_blocks.{block}.{position}.{part}" in self.state:
                return f"output_blocks.{block}.{position}"
        return None

    def attention_widths(self) -> set[int]:
        return {self.widths[-1], *(width for width, attends in zip(self.widths, self.attends, strict=True) if attends)}

    def config(self, image_size: int, head_channels: int) -> dict[str, Any]:
        """Arguments of UNet2DModel."""
        sampling = "Resnet{}sampleBlock2D" if self.residual_sampling else "{}Block2D"
        down, up = (
            [f"Attn{way}Block2D" if attends else sampling.format(way) for attends in self.attends]
            for way in ("Down", "Up")
        )
        return {
            "sample_size": image_size,
            "in_channels": self.channels,
            "out_channels": self.out_channels,
            "block_out_channels": self.widths,
            "layers_per_block": self.per_level - 1,
            "down_block_types": down,
            "up_block_types": up[::-1],
            "downsample_type": "resnet" if self.residual_sampling else "conv",
            "upsample_type": "resnet" if self.residual_sampling else "conv",
            "resnet_time_scale_shift": "scale_shift" if self.scale_shift else "default",
            "attention_head_dim": head_channels,
            "norm_num_groups": 32,
            "attn_norm_num_groups": 32,  # left out, the middle attention of a scale-shift network loses its norm
            "norm_eps": 1e-5,
            "flip_sin_to_cos": True,
            "freq_shift": 0,
            "num_class_embeds": self.classes,
        }

    def pairs(self) -> Iterator[tuple[str, str, str]]:
        """Official prefix, diffusers' prefix, and what lies there."""
        n = self.per_level - 1
        yield "time_embed.0", "time_embedding.linear_1", "layer"
        yield "time_embed.2", "time_embedding.linear_2", "layer"
        if self.classes:
            yield "label_emb", "class_embedding", "layer"
        yield "input_blocks.0.0", "conv_in", "layer"
        for level in range(self.levels):
            for j in range(n):
                block = f"input_blocks.{1 + level * self.per_level + j}"
                yield f"{block}.0", f"down_blocks.{level}.resnets.{j}", "residual"
                if self.attends[level]:
                    yield f"{block}.1", f"down_blocks.{level}.attentions.{j}", "attention"
            if level < self.levels - 1:
                yield from self._sampler(
                    f"input_blocks.{(level + 1) * self.per_level}.0", "op", f"down_blocks.{level}.downsamplers.0"
                )
        yield "middle_block.0", "mid_block.resnets.0", "residual"
        yield "middle_block.1", "mid_block.attentions.0", "attention"
        yield "middle_block.2", "mid_block.resnets.1", "residual"
        for u in range(self.levels):
            for j in range(self.per_level):
                block = f"output_blocks.{u * self.per_level + j}"
                yield f"{block}.0", f"up_blocks.{u}.resnets.{j}", "residual"
                if self.attends[self.levels - 1 - u]:
                    yield f"{block}.1", f"up_blocks.{u}.attentions.{j}", "attention"
            if u < self.levels - 1:
                yield from self._sampler(self.ups[(u + 1) * self.per_level - 1], "conv", f"up_blocks.{u}.upsamplers.0")
        yield "out.0", "conv_norm_out", "layer"
        yield "out.2", "conv_out", "layer"

    def _sampler(self, official: str, convolution: str, ours: str) -> Iterator[tuple[str, str, str]]:
        if self.residual_sampling:
            yield official, ours, "residual"
        else:
            yield f"{official}.{convolution}", f"{ours}.conv", "layer"


def _block(
    left: dict[str, Tensor], official: str, kind: str, head_channels: int, order: AttentionOrder
) -> Iterator[tuple[str, Tensor]]:
    """Takes the tensors of a block out of ``left``; their names in diffusers' block, and their values."""
    if kind == "layer":
        for part in ("weight", "bias"):
            if f"{official}.{part}" in left:
                yield part, left.pop(f"{official}.{part}")
        return
    if kind == "residual":
        names = {f"{official}.{theirs}.{part}": f"{ours}.{part}" for theirs, ours in RESIDUAL.items() for part in PARTS}
        for theirs, ours in names.items():
            if theirs in left:
                yield ours, left.pop(theirs)
        return
    for part in PARTS:
        if f"{official}.norm.{part}" not in left or f"{official}.qkv.{part}" not in left:
            raise ValueError(f"it is another network: {official} is no attention")
        yield f"group_norm.{part}", left.pop(f"{official}.norm.{part}")
        yield f"to_out.0.{part}", _matrix(left.pop(f"{official}.proj_out.{part}"))
        qkv = _matrix(left.pop(f"{official}.qkv.{part}"))
        rest = qkv.shape[1:]
        if order == "legacy":
            split = qkv.reshape(-1, 3, head_channels, *rest).unbind(1)
        else:
            split = qkv.chunk(3)
        for name, value in zip(("to_q", "to_k", "to_v"), split, strict=True):
            yield f"{name}.{part}", value.reshape(-1, *rest)


def _matrix(value: Tensor) -> Tensor:
    """A convolution over one position as a matrix; biases as they are."""
    return value if value.ndim == 1 else value.flatten(1)
