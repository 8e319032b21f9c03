"""The networks behind priors: diffusers' classes, with the one wrapper that makes them affordable on small machines."""

from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from equireg.folding import fold, unfold


class UNet(nn.Module):
    """diffusers' UNet2DModel on images folded by ``space_to_depth``.

    Folding s x s pixels into channels before the first layer and unfolding after the last divides the cost of every
    layer by s^2 at equal width.

    Args:
        config: arguments of ``diffusers.UNet2DModel``; its channels are those after folding.
        space_to_depth: side s of the folded blocks.
        image_by_image: evaluate the images of a batch one after the other, so that every bit of a result is the same
            in every batch: convolutions of single images and of batches differ in their rounding.

    Raises:
        ValueError: if ``UNet2DModel`` refuses the arguments.
    """

    def __init__(self, config: dict[str, Any], space_to_depth: int = 1, image_by_image: bool = False) -> None:
        super().__init__()
        try:
            self.unet = UNet2DModel(**config)
        except TypeError as error:
            raise ValueError(f"network: {error}") from error
        self.space_to_depth = space_to_depth
        self.image_by_image = image_by_image

    @property
    def in_channels(self) -> int:
        """Channels of one image."""
        return self.unet.config.in_channels // self.space_to_depth**2

    @property
    def out_channels(self) -> int:
        """Channels of the output at image resolution; twice ``in_channels`` when the variance is learned."""
        return self.unet.config.out_channels // self.space_to_depth**2

    @property
    def side_divisor(self) -> int:
        """Image sides must be multiples of this."""
        return self.space_to_depth * 2 ** (len(self.unet.config.block_out_channels) - 1)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width the network was made for."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.space_to_depth, width * self.space_to_depth

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Output (B, out_channels, H, W) for images x (B, C, H, W) at timesteps t (B,)."""
        folded = fold(x, self.space_to_depth)
        if self.image_by_image:
            images = zip(folded.split(1), t.split(1), strict=True)
            output = torch.cat([self.unet(image, t_image).sample for image, t_image in images])
        else:
            output = self.unet(folded, t).sample
        return unfold(output, self.space_to_depth)


def as_batch(t: int | float, x: Tensor) -> Tensor:
    """The timestep of every image in x: (B,), an integer tensor when t is an integer."""
    dtype = torch.long if isinstance(t, int) else torch.float32
    return torch.full((len(x),), t, device=x.device, dtype=dtype)
