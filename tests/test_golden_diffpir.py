"""DiffPIR reproduces the recorded runs of the official code, step by step."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from equireg.operators import CircularBlur, LinearOperator, RandomInpainting
from equireg.priors import VPPrior
from lightning_modules import DiffPIR
from lightning_modules.diffpir import SMALLEST_SIGMA, skipped_timesteps
from tests.golden import ReplayedDraws, parametrize_golden, share
from tests.test_golden_dps import TinyNetwork

TOLERANCE = 5e-5
"""That of the files' description: the published data step is float32, and cancels where rho is small."""


class RecordedEnlargement(CircularBlur):
    """The published blur and reduction; its plain picture is the recorded one."""

    def __init__(self, factor: int, picture: Tensor | None) -> None:
        super().__init__(factor=factor)
        self.picture = picture

    def baseline(self, y: Tensor, shape: tuple[int, int, int]) -> Tensor:
        return self.picture


def make_problem(data: dict[str, np.ndarray]) -> tuple[LinearOperator, Tensor]:
    """The operator, and y in [-1, 1]; a floored noise level stands for none."""
    shape = data["noise_init"].shape[1:]
    y = torch.from_numpy(data["y"])
    if "mask" in data:
        mask = torch.from_numpy(data["mask"]).float()[None, None]
        operator = RandomInpainting().with_parameters({"mask": mask}, shape)
    else:
        picture = 2 * torch.from_numpy(data["x_up"]) - 1 if "x_up" in data else None
        operator = RecordedEnlargement(int(data.get("sf", 1)), picture)
        operator = operator.with_parameters({"kernel": torch.from_numpy(data["kernel"])[None]}, shape)
        y = 2 * y - 1
    sigma_n = float(data["sigma_n"])
    operator.sigma_y = 2 * sigma_n if sigma_n > 1.001 * SMALLEST_SIGMA else 0.0
    return operator, y


def make_spacing(t_seq: list[int]) -> tuple[str, int]:
    for skip_type, num_steps in (("quad", len(t_seq)), ("uniform", len(t_seq) - 1)):
        if skipped_timesteps(1000, num_steps, skip_type)[::-1] == t_seq:
            return skip_type, num_steps
    raise AssertionError(f"{t_seq} is neither spaced quadratically nor uniformly")


@parametrize_golden("diffpir*.npz")
def test_golden_diffpir_reproduces_every_step(golden: Path) -> None:
    data = dict(np.load(golden))
    prior = VPPrior.from_network(TinyNetwork(data | {"x_init": data["noise_init"]}))
    operator, y = make_problem(data)
    skip_type, num_steps = make_spacing(data["t_seq"].tolist())
    settings = {name: float(data[name]) for name in ("lam", "zeta", "eta")}
    draws = [draw for pair in zip(data["noise_eta"], data["noise_zeta"], strict=True) for draw in pair]
    states, x0_nets, x0_hats, rhos = [], [], [], []
    prior.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
    prior.register_forward_hook(lambda _, inputs, output: x0_nets.append(output.x0_hat))

    def run(**options: bool) -> tuple[DiffPIR, Tensor]:
        for record in (states, x0_nets, x0_hats, rhos):
            record.clear()
        module = DiffPIR(prior, operator, num_steps, skip_type=skip_type, **settings, **options)
        correction = module.correction(operator)
        module.correction = lambda _: lambda y, x, rho: rhos.append(rho.item()) or correction(y, x, rho)
        module.listeners.append(lambda sampler, step, x0_hat: x0_hats.append(x0_hat))
        noise = ReplayedDraws([data["noise_init"], *draws])
        x = module.sample(y, operator, noise)
        assert not noise.draws
        return module, x

    module, x = run()
    steps = module.steps
    np.testing.assert_allclose(torch.stack([*states[1:], x, x]), data["x_path"], atol=TOLERANCE)
    np.testing.assert_allclose(share(x0_hats[:-1], steps[:-1]), share(data["x0_dc"], steps[:-1]), atol=TOLERANCE)
    np.testing.assert_allclose(x / 2 + 0.5, data["out01"], atol=TOLERANCE)
    # the published schedule is float32, in which 1 - alpha_bar has few digits at low noise
    np.testing.assert_allclose(rhos, data["rhos"][data["t_seq"][:-1]], rtol=1e-4)
    _, x0 = run(return_x0=True)
    np.testing.assert_allclose(share(x0_nets, steps), share(data["x0_net"], steps), atol=TOLERANCE)
    assert torch.equal(x0, x0_nets[-1])
    _, pasted = run(paste_known="mask" in data)
    np.testing.assert_allclose(pasted, data["x_final"], atol=TOLERANCE)
