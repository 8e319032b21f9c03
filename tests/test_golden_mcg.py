"""MCG reproduces the recorded runs of the official inpainting code, step by step."""

from pathlib import Path

import numpy as np
import torch

from equireg.operators import RandomInpainting
from equireg.priors import VPPrior, VPSchedule
from lightning_modules import MCG
from tests.golden import ReplayedDraws, parametrize_golden
from tests.test_golden_dps import TinyNetwork

TOLERANCE = 1e-5


@parametrize_golden("mcg*.npz")
def test_golden_mcg_reproduces_every_step(golden: Path) -> None:
    data = dict(np.load(golden))
    prior = VPPrior.from_network(TinyNetwork(data))
    mask = torch.from_numpy(data["mask"]).expand(data["x_init"].shape)[:, :1]
    operator = RandomInpainting(sigma_y=0.0).with_parameters({"mask": mask}, data["x_init"].shape[1:])
    module = MCG(prior, operator, num_steps=len(data["betas"]), zeta=1.0)
    schedule = VPSchedule(prior.alpha_bar, data["timestep_map"].tolist())
    np.testing.assert_allclose(schedule.beta, data["betas"], atol=1e-12)
    module.steps = list(schedule)
    states, x0_hats = [], []
    prior.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0].detach()))
    module.listeners.append(lambda sampler, step, x0_hat: x0_hats.append(x0_hat))

    draws = [draw for pair in zip(data["noise_p"], data["noise_q"], strict=True) for draw in pair]
    del draws[-2]  # the last ancestral draw is not used
    noise = ReplayedDraws([data["x_init"], *draws])
    x = module.sample(torch.from_numpy(data["y"]), operator, noise)

    assert not noise.draws
    np.testing.assert_allclose(torch.stack(x0_hats), data["x0_hat"], atol=TOLERANCE)
    np.testing.assert_allclose(torch.stack([*states[1:], x]), data["x_path"], atol=TOLERANCE)
    np.testing.assert_allclose(x, data["x_final"], atol=TOLERANCE)
