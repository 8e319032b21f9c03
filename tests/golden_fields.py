"""What the golden files of the field samplers share: their denoiser, and noise that replays recorded draws."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from equireg.operators import Sensors
from equireg.priors import EDMPrior

TOLERANCE = 1e-5
"""Relative; a relative change of 1e-6 in the initial state changes the result by as much."""


class TinyNetwork(nn.Module):
    """F(x, c) = conv2d(silu(conv2d(x, W1, b1) + a c), W2, b2)."""

    in_channels = 2
    side_divisor = 1

    def __init__(self, data: dict[str, np.ndarray], side: int) -> None:
        super().__init__()
        for name in ("W1", "b1", "a", "W2", "b2"):
            self.register_buffer(name, torch.from_numpy(data[name]))
        self.image_size = (side, side)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        hidden = nn.functional.conv2d(x, self.W1, self.b1, padding=1)
        hidden = nn.functional.silu(hidden + self.a.view(1, -1, 1, 1) * c_noise.view(-1, 1, 1, 1))
        return nn.functional.conv2d(hidden, self.W2, self.b2, padding=1)


class ReplayedNoise:
    """The recorded normals of the initial state, whatever their shape."""

    def __init__(self, draw: np.ndarray) -> None:
        self.draw = torch.from_numpy(draw)

    def randn(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        assert tuple(self.draw.shape[1:]) == tuple(shape)
        return self.draw.to(like)


def tiny_prior(data: dict[str, np.ndarray], side: int, std: Sequence[float], **options: object) -> EDMPrior:
    return EDMPrior.from_network(TinyNetwork(data, side), std=std, **options)


def residual_of(name: str) -> str:
    """Our name of the residual of a published data set: "helmholtz", or "ns-nonbounded" in several spellings."""
    return name if name == "helmholtz" else "ns_gradient_sum"


def sensors_at(masks: np.ndarray, batch: int) -> Sensors:
    """Sensors where masks (2, H, W) are one, the same for all fields."""
    positions = torch.from_numpy(np.flatnonzero(masks)).expand(batch, -1)
    return Sensors("both", len(positions[0])).with_parameters({"positions": positions}, masks.shape)


def check(ours: Tensor, recorded: np.ndarray, name: str) -> None:
    """Relative to the size of the array; fields are compared channel by channel, which differ by a factor of 100."""
    ours = ours.numpy()
    assert ours.shape == recorded.shape
    axes = (-2, -1) if ours.ndim >= 4 else tuple(range(ours.ndim))
    size = np.sqrt(np.mean(recorded.astype(np.float64) ** 2, axis=axes, keepdims=True))
    np.testing.assert_allclose(ours / size, recorded / size, rtol=0, atol=TOLERANCE, err_msg=name)
