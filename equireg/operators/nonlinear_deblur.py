"""Nonlinear deblurring: blurs of real cameras, as a network has learnt them."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from equireg.operators.base import Operator
from equireg.operators.blur_network import LATENT_SIDE, BlurNetwork

WEIGHTS = "GOPRO_wVAE.pth"
SOURCE = "https://drive.google.com/uc?id=1vRoDpIsrTRYZKsOMPNbPcMtFDpCT6Foy"
"""Where the published codes (DPS, DAPS) send their users for the model "GOPRO wVAE" of its authors' model zoo."""

LATENT_STD = 1.2
"""Standard deviation of the kernel latents in all published codes."""


class NonlinearDeblur(Operator):
    """A(x) = clip(2 G((x + 1) / 2, z) - 1, -1, 1), where G blurs by the kernel of the latent z (BKSE, CVPR 2021).

    The latent (512, H / 128, W / 128) is drawn from N(0, 1.2^2), differs from image to image, and stays the same for
    measurement and guidance. Published codes use the latent of seed 0 for all images (``shared``), except DPS, which
    draws another one in every call.

    Args:
        weights: the published checkpoint GOPRO_wVAE.pth.
        shared: one kernel for all images of the run instead of one each.
        shared_seed: seed of that kernel, below 2**32.
        sigma_y: standard deviation of the Gaussian noise; it is added after the clipping.
        poisson_rate: replaces the Gaussian noise by Poisson noise.

    Cost: a forward pass at 256 x 256 is about that of a large diffusion network.

    Raises:
        FileNotFoundError: if the checkpoint is not there.
        ValueError: if it is of another network, or ``shared_seed`` is out of range.
    """

    parameter_names = ("kernel_latent",)

    def __init__(
        self,
        weights: str = f"checkpoints/{WEIGHTS}",
        shared: bool = False,
        shared_seed: int = 0,
        sigma_y: float = 0.05,
        poisson_rate: float | None = None,
    ) -> None:
        super().__init__(sigma_y, poisson_rate)
        if not 0 <= shared_seed < 2**32:
            raise ValueError(f"shared_seed={shared_seed} must be between 0 and 2**32 - 1")
        self.shared = shared
        self.shared_seed = shared_seed
        self.network = _read_network(weights).eval().requires_grad_(False)
        digest = hashlib.sha256()
        for value in self.network.state_dict().values():
            digest.update(value.numpy().tobytes())
        self.weights_digest = digest.hexdigest()  # the file may be moved: its path is no part of the measurement

    def check_shape(self, shape: tuple[int, int, int]) -> None:
        channels, height, width = shape
        if channels != 3 or height % LATENT_SIDE or width % LATENT_SIDE:
            raise ValueError(
                f"images of {channels} channels and {height}x{width} pixels cannot be blurred by NonlinearDeblur; they "
                f"need 3 channels and sides that are multiples of {LATENT_SIDE}"
            )

    def draw(self, shape: tuple[int, int, int], seed: int) -> dict[str, Tensor]:
        rng = np.random.RandomState(self.shared_seed if self.shared else seed)
        latent = LATENT_STD * rng.randn(self.network.latent_channels, shape[1] // LATENT_SIDE, shape[2] // LATENT_SIDE)
        return {"kernel_latent": torch.from_numpy(latent.astype(np.float32))}

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # A is part of the problem, not of the prior
            return (2 * self.network((x + 1) / 2, self.kernel_latent) - 1).clamp(-1, 1)


def _read_network(weights: str) -> BlurNetwork:
    if not Path(weights).is_file():
        raise FileNotFoundError(
            f"weights={weights!r} does not exist; download {WEIGHTS} (461 MB) from {SOURCE} and put it there"
        )
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise ValueError(f"weights={weights!r} is damaged or not a checkpoint of tensors alone ({WEIGHTS})") from error
    try:
        return BlurNetwork.from_state(state)
    except ValueError as error:
        raise ValueError(f"weights={weights!r}: {error}; expected {WEIGHTS}") from error
