"""Images as pictures: 8-bit values, PNG files, grids."""

import io

import torch
from PIL import Image
from torch import Tensor

DIVERGING = ((0.02, 0.19, 0.38), (0.26, 0.58, 0.76), (0.97, 0.97, 0.97), (0.84, 0.38, 0.30), (0.40, 0.00, 0.12))
"""Colours (red, green, blue) of fields, from the most negative over 0 to the most positive value."""


def to_uint8(images: Tensor) -> Tensor:
    """8-bit values of images in [-1, 1], clipped and rounded (published code often truncates)."""
    return ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def from_uint8(pictures: Tensor) -> Tensor:
    """Images in [-1, 1] of 8-bit values."""
    return pictures.float() / 127.5 - 1


def encode_png(picture: Tensor) -> bytes:
    """The PNG file of 8-bit values (C, H, W), grey or RGB.

    Raises:
        ValueError: if there are neither 1 nor 3 channels.
    """
    if picture.dtype != torch.uint8 or picture.ndim != 3 or len(picture) not in (1, 3):
        raise ValueError(f"a PNG holds 8-bit values (1 or 3, H, W), got {picture.dtype} {tuple(picture.shape)}")
    pixels = picture.cpu().permute(1, 2, 0).squeeze(2).contiguous().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def picture_grid(images: Tensor, columns: int | None = None) -> Tensor:
    """One picture (C, rows H, columns W) in [0, 1] of images (N, C, H, W) in [-1, 1]; near-square when not told."""
    count, channels, height, width = images.shape
    columns = columns or -(-count // max(1, int(count**0.5)))
    rows = -(-count // columns)
    canvas = images.new_zeros(rows * columns, channels, height, width)
    canvas[:count] = (images.detach().float().clamp(-1, 1) + 1) / 2
    return (
        canvas.view(rows, columns, channels, height, width)
        .permute(2, 0, 3, 1, 4)
        .reshape(channels, rows * height, columns * width)
    )


def field_pictures(fields: Tensor, largest: Tensor | float | None = None) -> Tensor:
    """Fields in colours, negative blue, positive red, the channels side by side: (N, 3, H, C W) in [-1, 1].

    Args:
        fields: (N, C, H, W); where they are not finite the picture is black.
        largest: absolute value of the full colours, broadcast against (N, C, 1, 1); the largest one of every channel
            and field when left out.
    """
    fields = fields.detach().float()
    if largest is None:
        largest = fields.nan_to_num(0, 0, 0).abs().amax((2, 3), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    colours = torch.tensor(DIVERGING, device=fields.device)
    place = ((fields / torch.as_tensor(largest).to(fields)).clamp(-1, 1) + 1) / 2 * (len(colours) - 1)
    below = place.nan_to_num().floor().long().clamp(0, len(colours) - 2)
    fraction = (place - below)[..., None]
    mixed = torch.lerp(colours[below], colours[below + 1], fraction).nan_to_num()  # (N, C, H, W, 3)
    return 2 * mixed.permute(0, 4, 2, 1, 3).flatten(3) - 1
