"""DAPS, LatentDAPS and Equi-LatentDAPS reproduce the recorded runs of the official code, step by step."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from equireg.groups import GROUPS
from equireg.mpe import MPE
from equireg.operators import Operator
from equireg.priors import LatentPrior, Step, VPPrior, power_sigmas
from equireg.regularizer import Regularizer, WeightSchedule
from lightning_modules import DAPS, LatentDAPS
from tests.golden import GoldenArrays, parametrize_golden

STATES, IMAGES = 2e-5, 1e-5
"""Tolerances of the files' description; the states reach 300, their last bits 3e-5, before the chain contracts them."""


class RecordedNetwork(nn.Module):
    """silu(conv + a t / 1000), conv; its channels after the first C are a learned variance."""

    side_divisor = 1

    def __init__(self, data: GoldenArrays) -> None:
        super().__init__()
        self.weights = {name: data.tensor(name) for name in ("W1", "b1", "a", "W2", "b2")}
        self.in_channels, self.out_channels = self.weights["W1"].shape[1], self.weights["W2"].shape[0]
        self.image_size = tuple(data["start"].shape[-2:])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        w = self.weights
        hidden = nn.functional.conv2d(x, w["W1"], w["b1"], padding=1)
        hidden = nn.functional.silu(hidden + w["a"].view(1, -1, 1, 1) * (t / 1000).view(-1, 1, 1, 1))
        return nn.functional.conv2d(hidden, w["W2"], w["b2"], padding=1)


class RecordedAutoencoder(nn.Module):
    """tanh(conv stride 4) and its transposed twin."""

    family, channels, factor, scale_factor = "kl", 3, 4, 1.0

    def __init__(self, data: GoldenArrays) -> None:
        super().__init__()
        self.weights = {name: data.tensor(name) for name in ("We", "be", "Wd", "bd")}
        self.latent_channels = data["start"].shape[1]

    def check_shape(self, shape: tuple[int, int, int]) -> None:
        """Accepts every shape."""

    def encode(self, x: Tensor) -> Tensor:
        return torch.tanh(nn.functional.conv2d(x, self.weights["We"], self.weights["be"], stride=4))

    def decode(self, z: Tensor) -> Tensor:
        return torch.tanh(nn.functional.conv_transpose2d(z, self.weights["Wd"], self.weights["bd"], stride=4))


class RecordedOperator(Operator):
    """The operator of the file: a mask, a matrix on both axes, or a correlation kernel with reflection."""

    def __init__(self, data: GoldenArrays) -> None:
        super().__init__(float(data["cfg_sigma_y"]))
        (self.name,) = (name for name in ("mask", "R", "kernel") if name in data)
        self.array = data.tensor(self.name)
        self.image_shape = tuple(data["x_true"].shape[1:])

    def forward(self, x: Tensor) -> Tensor:
        if self.name == "mask":
            return self.array * x
        if self.name == "R":
            return self.array @ x @ self.array.T
        radius = self.array.shape[-1] // 2
        padded = nn.functional.pad(x, (radius,) * 4, mode="reflect")
        return nn.functional.conv2d(padded, self.array.expand(x.shape[1], 1, -1, -1), groups=x.shape[1])


class ReplayedNoise:
    """The start; then per step the velocity when there is momentum, the chain's draws, and the fresh noise."""

    def __init__(self, data: GoldenArrays) -> None:
        self.draws = [data.tensor("start_noise")]
        for i in range(len(data["eps"])):
            velocity = [data.tensor("v0")[i]] if data["cfg_momentum"] > 0 else []
            self.draws += [*velocity, *data.tensor("eps")[i], data.tensor("renoise")[i]]

    def randn(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        draw = self.draws.pop(0)
        assert tuple(draw.shape[1:]) == tuple(shape)
        return draw


class ReplayedElements:
    """The recorded group element of every step, the same for the images of a batch unless the file has one each."""

    def __init__(self, data: GoldenArrays, pool: tuple[int, ...]) -> None:
        batch = len(data["x_true"])
        active = data["lam_t"] != 0
        self.draws = [[pool.index(int(j)) for j in np.broadcast_to(g, batch)] for g in data["g"][active]]

    def randint(self, high: int, device: torch.device) -> Tensor:
        return torch.tensor(self.draws.pop(0), device=device)


class RecordedFunction(MPE):
    """The decoder; after it the encoder for EquiCon, before it the image itself for pixel-space DAPS."""

    def __init__(self, autoencoder: RecordedAutoencoder, space: str, maps_to_itself: bool) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.space, self.maps_to_itself = space, maps_to_itself

    def forward(self, x: Tensor) -> Tensor:
        if self.space == "pixel":
            features = self.autoencoder.encode(x)
            return self.autoencoder.decode(features) if self.maps_to_itself else features
        image = self.autoencoder.decode(x)
        return self.autoencoder.encode(image) if self.maps_to_itself else image


def make_penalty(data: GoldenArrays, stem: str, module: DAPS) -> Regularizer:
    loss = "equicon" if stem.startswith("equicon") else "equi"
    elements = set(data["g"].flatten().tolist())
    named = [name for name in stem.split("_") if name in GROUPS]
    group = named[-1] if named else "rot90_full" if 2 in elements else "rot90" if 3 in elements else "hflip"
    schedules = [WeightSchedule(float(data["lam"]), scale) for scale in ("sigma", "sigma_over_alpha", "none")]
    recorded = (s for s in schedules if np.allclose([s(step) for step in module.steps], data["lam_t"], rtol=1e-6))
    function = RecordedFunction(RecordedAutoencoder(data), module.space, loss == "equicon")
    return Regularizer(function, group, next(recorded), loss)


def make_sampler(data: GoldenArrays) -> DAPS:
    momentum = float(data["cfg_momentum"])
    settings = {
        "num_steps": int(data["cfg_S"]),
        "sigma_max": float(data["cfg_sigma_max"]),
        "sigma_min": float(data["cfg_sigma_min"]),
        "ode_steps": int(data["cfg_ode_steps"]),
        "ode_sigma_min": float(data["cfg_ode_sigma_min"]),
        "mcmc_steps": int(data["cfg_K"]),
        "eta": float(data["cfg_lr0"]),
        "eta_min_ratio": float(data["cfg_lr_min_ratio"]),
        "momentum": 0.0 if np.isnan(momentum) else momentum,
        "tau": float(data["cfg_tau"]),
    }
    prior = VPPrior.from_network(RecordedNetwork(data))
    if "Wd" in data and data["start"].shape != data["x_true"].shape:
        return LatentDAPS(LatentPrior(prior, RecordedAutoencoder(data)), RecordedOperator(data), **settings)
    return DAPS(prior, RecordedOperator(data), **settings)


@parametrize_golden("daps*.npz", "latentdaps*.npz", "equi*daps*.npz")
def test_golden_daps_reproduces_every_step(golden: Path) -> None:
    data = GoldenArrays(golden)
    module = make_sampler(data)
    sigmas = [step.sigma for step in module.steps] + [module.steps[-1].sigma_next]
    np.testing.assert_allclose(sigmas, data["sigmas"], rtol=1e-7)
    np.testing.assert_allclose([module.step_size(step) for step in module.steps], data["lr"], rtol=1e-6)
    levels = power_sigmas(sigmas[0], module.ode_sigma_min, module.ode_steps + 1)
    np.testing.assert_allclose(levels, data["ode_times_first"], rtol=1e-6)

    before_penalty, penalties, flows, chains = [], [], [], []
    if "lam" in data:
        regularizer = make_penalty(data, golden.stem, module)
        module.attach(regularizer)
        regularizer.start(ReplayedElements(data, regularizer.group.pool))

        def penalty_at(x0: Tensor, step: Step) -> Tensor:
            before_penalty.append(x0.detach())
            penalties.append(regularizer(x0, step))
            return penalties[-1]

        module.penalty_at = penalty_at
    flow = module.probability_flow
    module.probability_flow = lambda x, sigma: flows.append((x, flow(x, sigma))) or flows[-1][1]
    module.listeners.append(lambda sampler, step, x0: chains.append(x0))
    noise = ReplayedNoise(data)
    with torch.enable_grad():
        image = module.sample(data.tensor("y"), module.operator, noise)

    assert not noise.draws
    states, names = ("x", ("xt", "x0hat", "x0y")) if "xt" in data else ("z", ("zt", "z0hat", "z0y"))
    for name, ours in zip(names, ([x for x, _ in flows], [x0 for _, x0 in flows], chains), strict=True):
        data.check(name, torch.stack(ours), STATES)
    if "lam" in data:
        active = data["lam_t"] != 0
        before = data.tensor(f"{states}0y_before_equi")[active]
        torch.testing.assert_close(torch.stack(before_penalty), before, rtol=0, atol=STATES)
        weighted = data.tensor("penalty") * data.tensor("lam_t")[:, None]
        torch.testing.assert_close(torch.stack(penalties).detach(), weighted[active], rtol=1e-5, atol=0)
    data.check("out", image, IMAGES if module.space == "latent" else STATES)
