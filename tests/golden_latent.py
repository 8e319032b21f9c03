"""The tiny latent diffusion models of the golden files of PSLD, ReSample and their regularised forms."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d, interpolate, pad

from equireg.mpe import PriorDecoder, PriorRoundTrip
from equireg.noise import Noise
from equireg.operators import LinearOperator
from equireg.priors import LatentPrior, Step, VPPrior
from equireg.regularizer import Regularizer, WeightSchedule
from tests.test_golden_dps import TinyNetwork


class RecordedAutoencoder(nn.Module):
    """tanh of one strided convolution each way; with a log-variance (KL) or a codebook (VQ) where the file has them."""

    factor = 4

    def __init__(self, data: dict[str, np.ndarray]) -> None:
        super().__init__()
        self.data = {
            name: torch.from_numpy(data[name])
            for name in ("We", "be", "Wl", "bl", "Wd", "bd", "codebook")
            if name in data
        }
        self.family = "kl" if "Wl" in data else "vq"
        self.latent_channels, self.channels = self.data["Wd"].shape[:2]
        self.scale_factor = float(data.get("scale_factor", 1.0))

    def encode(self, x: Tensor) -> Tensor:
        return torch.tanh(conv2d(x, self.data["We"], self.data["be"], stride=4))

    def sample(self, x: Tensor, noise: Noise) -> Tensor:
        mean, log_variance = self.encode(x), conv2d(x, self.data["Wl"], self.data["bl"], stride=4).clamp(-30, 20)
        return mean + (0.5 * log_variance).exp() * noise.randn(tuple(mean.shape[1:]), like=mean)

    def decode(self, z: Tensor) -> Tensor:
        if "codebook" in self.data:
            codebook = self.data["codebook"]
            distance = (z.movedim(1, -1).unsqueeze(-2) - codebook).square().sum(-1)
            z = z + (codebook[distance.argmin(-1)].movedim(-1, 1) - z).detach()
        return torch.tanh(conv_transpose2d(z, self.data["Wd"], self.data["bd"], stride=4))


class RecordedOperator(LinearOperator):
    """The operator of the file: a mask, a kernel, or the reduction R X R^T."""

    def __init__(self, data: dict[str, np.ndarray], sigma_y: float) -> None:
        super().__init__(sigma_y)
        self.data = {name: torch.from_numpy(data[name]).float() for name in ("mask", "kernel", "R") if name in data}
        self.image_shape = (3, 32, 32)

    def forward(self, x: Tensor) -> Tensor:
        if "mask" in self.data:
            return self.data["mask"] * x
        if "R" in self.data:
            return self.data["R"] @ x @ self.data["R"].T
        kernel = self.data["kernel"]
        padded = pad(x, (kernel.shape[-1] // 2,) * 4, mode="reflect")
        return conv2d(padded, kernel.expand(x.shape[1], 1, -1, -1), groups=x.shape[1])

    def adjoint(self, y: Tensor) -> Tensor:
        raise AssertionError("the published code never calls it")

    def back_projection(self, y: Tensor) -> Tensor:
        return interpolate(y, size=self.image_shape[1:], mode="nearest") if "R" in self.data else y


class RecordedWeights(WeightSchedule):
    """lambda in the first steps, none after the recorded cut-off."""

    def __init__(self, data: dict[str, np.ndarray]) -> None:
        super().__init__(float(data["lam"]))
        self.last = int(data["num_steps_requested"]) - int(data["cutoff_steps"])

    def __call__(self, step: Step) -> float:
        return self.weight if step.k <= self.last else 0.0


class ReplayedNoise:
    """The recorded draws, in the order in which they are asked for."""

    def __init__(self, draws: list[np.ndarray]) -> None:
        self.draws = [torch.from_numpy(draw) for draw in draws]

    def randn(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        draw = self.draws.pop(0)
        assert tuple(draw.shape[1:]) == tuple(shape)
        return draw


class ReplayedElements:
    """Places in the group's pool of the recorded elements, those of one image; always the first where none are."""

    def __init__(self, elements: list[int], pool: tuple[int, ...]) -> None:
        self.places = [pool.index(element) for element in elements]

    def randint(self, high: int, device: torch.device) -> Tensor:
        return torch.tensor([self.places.pop(0) if self.places else 0], device=device)


def make_prior(data: dict[str, np.ndarray]) -> LatentPrior:
    prior = VPPrior.from_network(
        TinyNetwork(data | {"x_init": data["z_T"]}),
        beta_schedule="scaled_linear",
        beta_start=float(data["beta_start"]),
        beta_end=float(data["beta_end"]),
    )
    return LatentPrior(prior, RecordedAutoencoder(data), float(data["scale_factor"]))


def make_penalty(data: dict[str, np.ndarray]) -> Regularizer:
    loss, function = ("equi", PriorDecoder()) if str(data["form"]) == "equi" else ("equicon", PriorRoundTrip())
    reduction = str(data["reduction"]) if "reduction" in data else "norm"
    penalty = Regularizer(function, str(data["group"]), RecordedWeights(data), loss, reduction)
    elements = [int(g) for g in data.get("group_idx", []) if g >= 0]
    penalty.start(ReplayedElements(elements, penalty.group.pool))
    return penalty
