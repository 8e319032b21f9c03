"""DPS, Equi-DPS and EquiCon-DPS reproduce the recorded runs of the official code, step by step."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from equireg.groups import GROUPS
from equireg.mpe import MPE
from equireg.operators import Operator
from equireg.priors import Step, VPPrior, VPSchedule
from equireg.regularizer import Regularizer, WeightSchedule
from lightning_modules import DPS
from tests.golden import parametrize_golden

TOLERANCE = 1e-5
"""Float32 of two implementations of the same arithmetic."""


class TinyNetwork(nn.Module):
    """silu(conv + a t / 1000), conv: the network of all pixel-solver files."""

    side_divisor = 1

    def __init__(self, data: dict[str, np.ndarray]) -> None:
        super().__init__()
        for name in ("W1", "b1", "a", "W2", "b2"):
            self.register_buffer(name, torch.from_numpy(data[name]))
        self.in_channels, self.out_channels = self.W1.shape[1], self.W2.shape[0]
        self.image_size = tuple(data["x_init"].shape[-2:])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        hidden = nn.functional.conv2d(x, self.W1, self.b1, padding=1)
        hidden = nn.functional.silu(hidden + self.a.view(1, -1, 1, 1) * (t.float() / 1000).view(-1, 1, 1, 1))
        return nn.functional.conv2d(hidden, self.W2, self.b2, padding=1)


class RecordedOperator(Operator):
    """The operator of the file: a matrix per channel, a mask, a correlation kernel, or Fourier amplitudes."""

    def __init__(self, data: dict[str, np.ndarray]) -> None:
        super().__init__()
        self.data = {name: torch.from_numpy(data[name]) for name in ("A", "mask", "kernel", "F") if name in data}
        self.image_shape = tuple(data["x_init"].shape[1:])

    def forward(self, x: Tensor) -> Tensor:
        if "A" in self.data:
            return x.flatten(2) @ self.data["A"].T
        if "mask" in self.data:
            return self.data["mask"] * x
        if "kernel" in self.data:
            kernel = self.data["kernel"]
            radius = kernel.shape[-1] // 2
            padded = nn.functional.pad(x, (radius,) * 4, mode="reflect")
            return nn.functional.conv2d(padded, kernel.expand(x.shape[1], 1, -1, -1), groups=x.shape[1])
        return (self.data["F"] @ x.to(self.data["F"].dtype) @ self.data["F"].T).abs()


class RecordedFunction(MPE):
    """f = tanh(conv stride 4), or D o E with its transposed twin."""

    def __init__(self, data: dict[str, np.ndarray]) -> None:
        super().__init__()
        self.data = {name: torch.from_numpy(data[name]) for name in ("We", "be", "Wd", "bd") if name in data}
        self.maps_to_itself = "Wd" in self.data

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(nn.functional.conv2d(x, self.data["We"], self.data["be"], stride=4))
        if not self.maps_to_itself:
            return z
        return torch.tanh(nn.functional.conv_transpose2d(z, self.data["Wd"], self.data["bd"], stride=4))


class RecordedWeights(WeightSchedule):
    def __init__(self, lam: np.ndarray) -> None:
        super().__init__(1.0)
        self.lam = lam.tolist()

    def __call__(self, step: Step) -> float:
        return self.lam[step.k]


class ReplayedNoise:
    """x_init, then one ancestral draw per step."""

    def __init__(self, data: dict[str, np.ndarray]) -> None:
        self.draws = [torch.from_numpy(data["x_init"]), *torch.from_numpy(data["noise"])]

    def randn(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        draw = self.draws.pop(0)
        assert tuple(draw.shape[1:]) == tuple(shape)
        return draw


class ReplayedElements:
    """Positions of the recorded elements in the group's pool; the recorded index counts elements."""

    def __init__(self, idx: np.ndarray, pool: tuple[int, ...], active: np.ndarray) -> None:
        self.positions = [pool.index(int(i)) for i, on in zip(idx, active, strict=True) if on]

    def randint(self, high: int, device: torch.device) -> Tensor:
        return torch.tensor([self.positions.pop(0)], device=device)


def make_prior(data: dict[str, np.ndarray]) -> VPPrior:
    return VPPrior.from_network(TinyNetwork(data))  # learned_range with six channels, fixed_large with three


def make_penalty(data: dict[str, np.ndarray], stem: str) -> Regularizer:
    loss = "equicon" if stem.startswith("equicon") else "equi"
    named = [name for name in stem.split("_") if name in GROUPS]
    group = named[-1] if named else "rot90" if (data["idx"] == 3).any() else "hflip"
    reduction = "mse" if loss == "equicon" else "sqnorm" if group == "rot90" else "norm"
    return Regularizer(RecordedFunction(data), group, RecordedWeights(data["lam"]), loss, reduction)


@parametrize_golden("dps*.npz", "equi_dps*.npz", "equicon_dps*.npz")
def test_golden_dps_reproduces_every_step(golden: Path) -> None:
    data = dict(np.load(golden))
    prior = make_prior(data)
    module = DPS(prior, RecordedOperator(data), num_steps=len(data["betas"]), zeta=float(data["scale"]))
    schedule = VPSchedule(prior.alpha_bar, [int(t) for t in data["timestep_map"]])
    np.testing.assert_allclose(schedule.beta, data["betas"], atol=1e-12)
    module.steps = list(schedule)
    if "lam" in data:
        penalty = make_penalty(data, golden.stem)
        module.attach(penalty)
        penalty.start(ReplayedElements(data["idx"], penalty.group.pool, data["lam"] != 0))
    x0_hats, penalties, gradients = [], [], []
    module.listeners.append(lambda sampler, step, x0_hat: x0_hats.append(x0_hat))
    original = module.penalty_at
    module.penalty_at = lambda *args: penalties.append(original(*args)) or penalties[-1]
    guidance = module.guidance
    module.guidance = lambda *args: gradients.append(guidance(*args)) or gradients[-1]

    with torch.enable_grad():
        x = module.sample(torch.from_numpy(data["y"]), module.operator, ReplayedNoise(data))

    for recorded, ours in (("x0_hat", x0_hats), ("grad", gradients)):
        ours = torch.stack(ours).view(data[recorded].shape)
        np.testing.assert_allclose(ours.numpy(), data[recorded], atol=TOLERANCE, err_msg=recorded)
    if "penalty" in data:
        ours = torch.cat(penalties).detach().numpy()
        np.testing.assert_allclose(ours, data["penalty"].reshape(-1), atol=TOLERANCE)
    np.testing.assert_allclose(x.numpy(), data["x_final"], atol=TOLERANCE)
