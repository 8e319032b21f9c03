"""Folding of pixels into channels, in front of a network and after it."""

from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle


def fold(x: Tensor, side: int) -> Tensor:
    """side x side pixels into channels: (B, C, H, W) -> (B, C side^2, H/side, W/side)."""
    return x if side == 1 else pixel_unshuffle(x, side)


def unfold(x: Tensor, side: int) -> Tensor:
    """The inverse of ``fold``."""
    return x if side == 1 else pixel_shuffle(x, side)
