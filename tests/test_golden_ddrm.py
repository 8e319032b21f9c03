"""DDRM reproduces the recorded runs of the official code, step by step."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from equireg.operators import LinearOperator, OperatorSVD
from equireg.priors import VPPrior
from lightning_modules import DDRM
from tests.golden import ReplayedDraws, parametrize_golden, share
from tests.test_golden_dps import TinyNetwork

TOLERANCE = 3e-5
"""That of the files' description."""


class RecordedSVD(OperatorSVD):
    """A = U diag(s) V[:, :m]^T on flattened images; the zeros of s are measured."""

    def __init__(self, data: dict[str, np.ndarray]) -> None:
        self.left, self.right = torch.from_numpy(data["U"]), torch.from_numpy(data["V"])
        self.missing = len(self.right) - len(self.left)
        s = torch.from_numpy(data["s"])
        present = torch.arange(len(self.right)) < len(s)
        padded = torch.nn.functional.pad(s, (0, self.missing))
        super().__init__(data["x_T"].shape[1:], padded[None], present[None])

    def Vt(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.right

    def V(self, coefficients: Tensor) -> Tensor:
        return (coefficients @ self.right.T).view(-1, *self.shape)

    def Ut(self, y: Tensor) -> Tensor:
        return torch.nn.functional.pad(y @ self.left, (0, self.missing))

    def U(self, coefficients: Tensor) -> Tensor:
        return coefficients[:, : len(self.left)] @ self.left.T


class RecordedOperator(LinearOperator):
    def __init__(self, data: dict[str, np.ndarray]) -> None:
        super().__init__(float(data["sigma_0"]))
        self.recorded = RecordedSVD(data)
        self.image_shape = tuple(data["x_T"].shape[1:])

    def forward(self, x: Tensor) -> Tensor:
        return self.recorded.U(self.recorded.singular_values * self.recorded.Vt(x))

    def adjoint(self, y: Tensor) -> Tensor:
        return self.recorded.V(self.recorded.singular_values * self.recorded.Ut(y))

    def svd(self, shape: tuple[int, int, int], threshold: float = 0.0) -> OperatorSVD:
        return self.recorded


@parametrize_golden("ddrm*.npz")
def test_golden_ddrm_reproduces_every_step(golden: Path) -> None:
    data = dict(np.load(golden))
    prior = VPPrior.from_network(TinyNetwork(data | {"x_init": data["x_T"]}))
    seq = data["seq"].tolist()
    module = DDRM(
        prior,
        RecordedOperator(data),
        num_steps=1000 // seq[1] if len(seq) > 1 else 1,
        eta=float(data["eta"]),
        eta_b=float(data["etaB"]),
    )
    assert [step.t for step in module.steps] == seq[::-1]
    states, x0_hats = [], []
    prior.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
    module.listeners.append(lambda sampler, step, x0_hat: x0_hats.append(x0_hat))

    noise = ReplayedDraws([data["x_T"], *data["noise_spec"]])
    x = module.sample(torch.from_numpy(data["y"]), module.operator, noise)

    assert not noise.draws
    np.testing.assert_allclose(torch.stack([*states, x]), data["x_path"], atol=TOLERANCE)
    np.testing.assert_allclose(share(x0_hats, module.steps), share(data["x0_hat"], module.steps), atol=TOLERANCE)
    np.testing.assert_allclose(x, data["x_final"], atol=TOLERANCE)
