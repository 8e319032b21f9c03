"""The network of encoded blur kernels: G(x, z) blurs a sharp image x by the kernel that the latent z stands for."""

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn

LATENT_SIDE = 128
"""Pixels per latent entry: the features are at a quarter of the side, and the adapter halves it five times more."""

UNUSED = "kernel_extractor."
"""The part of the checkpoint that finds z for a given blur."""


class BlurNetwork(nn.Module):
    """Tran et al., "Explore Image Deblurring via Encoded Blur Kernel Space", CVPR 2021 (arXiv 2104.00317).

    Module names are those of the published state dict.

    Args:
        width: channels of the features.
        front_blocks: residual blocks of the feature extractor.
        back_blocks: residual blocks of the reconstruction.
        full_width: channels of the features at full resolution; 64 in all published networks.
    """

    def __init__(self, width: int = 64, front_blocks: int = 10, back_blocks: int = 20, full_width: int = 64) -> None:
        super().__init__()
        self.latent_channels = 8 * width
        self.feature_extractor = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            nn.LeakyReLU(0.1),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
            nn.LeakyReLU(0.1),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
            nn.LeakyReLU(0.1),
            *(ResidualBlock(width) for _ in range(front_blocks)),
        )
        self.adapter = nn.Module()
        self.adapter.model = AdapterLevel([width, width, 2 * width, 4 * width, 8 * width, 8 * width])
        self.recon_trunk = nn.Sequential(
            *(ResidualBlock(width) for _ in range(back_blocks)),
            nn.Conv2d(width, 4 * width, 3, padding=1),
            nn.PixelShuffle(2),
            nn.LeakyReLU(0.1),
            nn.Conv2d(width, 4 * full_width, 3, padding=1),
            nn.PixelShuffle(2),
            nn.LeakyReLU(0.1),
            nn.Conv2d(full_width, full_width, 3, padding=1),
            nn.LeakyReLU(0.1),
            nn.Conv2d(full_width, 3, 3, padding=1),
        )

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Self:
        """The network of a state dict, whose sizes tell the architecture; what blurring does not use is dropped.

        Raises:
            ValueError: if the state dict is of another network.
        """
        if not isinstance(state, Mapping):
            raise ValueError(f"this is no state dict but a {type(state).__name__}")
        state = {name: value for name, value in state.items() if not name.startswith(UNUSED)}
        blocks = [name.split(".")[0] for name in state if name.endswith(".conv1.weight")]
        front, back = blocks.count("feature_extractor"), blocks.count("recon_trunk")
        try:
            width = len(state["feature_extractor.0.weight"])
            network = cls(width, front, back, full_width=len(state[f"recon_trunk.{back + 6}.weight"]))
            network.load_state_dict(state)
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"this is no network of encoded blur kernels ({str(error).splitlines()[0]})") from error
        return network

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Blurred images (B, 3, H, W), not clipped.

        Args:
            x: sharp images in [0, 1], (B, 3, H, W), sides multiples of 128.
            z: kernel latents (B, latent_channels, H / 128, W / 128).
        """
        return self.recon_trunk(self.adapter.model(self.feature_extractor(x), z)) + x


class ResidualBlock(nn.Module):
    """h + conv(relu(conv(h)))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.conv2(torch.relu(self.conv1(h)))


class AdapterLevel(nn.Module):
    """One level of a U-Net that halves the side; z joins below the innermost one.

    Args:
        widths: channels of its input and of what follows at every halving of the side.
        is_outermost: the level that makes the adapter's output.
    """

    def __init__(self, widths: list[int], is_outermost: bool = True) -> None:
        super().__init__()
        outer, inner = widths[:2]
        self.is_outermost = is_outermost
        self.submodule = AdapterLevel(widths[1:], is_outermost=False) if len(widths) > 2 else None
        halve = nn.Conv2d(outer, inner, 4, stride=2, padding=1, bias=False)
        double = nn.ConvTranspose2d(2 * inner, outer, 4, stride=2, padding=1, bias=is_outermost)
        if is_outermost:
            self.down = nn.Sequential(halve)
            self.up = nn.Sequential(nn.ReLU(), double, nn.Tanh())
        else:
            self.down = nn.Sequential(nn.LeakyReLU(0.2), halve)
            self.up = nn.Sequential(nn.ReLU(), double)

    def forward(self, h: Tensor, z: Tensor) -> Tensor:
        below = self.down(h)
        below = torch.cat([below, z], 1) if self.submodule is None else self.submodule(below, z)
        if self.is_outermost:
            return self.up(below)
        # the published activation works in place, so the skip carries its result; the ReLU that follows hides that
        return torch.cat([self.up(below), h], 1)
