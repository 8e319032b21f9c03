"""MPGD and MPGD-AE reproduce the recorded runs of the official code, step by step."""

from pathlib import Path

import numpy as np
import torch

from equireg.priors import VPPrior, VPSchedule
from lightning_modules import MPGD, MPGDAE
from tests.golden import ReplayedDraws, parametrize_golden, share
from tests.test_golden_dps import RecordedFunction, RecordedOperator, TinyNetwork

TOLERANCE = 2e-5
"""That of the files' description."""


@parametrize_golden("mpgd*.npz")
def test_golden_mpgd_reproduces_every_step(golden: Path) -> None:
    data = dict(np.load(golden))
    prior = VPPrior.from_network(TinyNetwork(data))
    settings = {name: float(data[name]) for name in ("scale", "eta")} | {"num_steps": len(data["betas"])}
    if "Wd" in data:
        module = MPGDAE(prior, RecordedOperator(data), RecordedFunction(data), **settings)
    else:
        module = MPGD(prior, RecordedOperator(data), **settings)
    schedule = VPSchedule(prior.alpha_bar, data["timestep_map"].tolist())
    np.testing.assert_allclose(schedule.beta, data["betas"], atol=1e-12)
    module.steps = list(schedule)
    states, x0_nets, x0_hats, norms = [], [], [], []
    prior.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
    prior.register_forward_hook(lambda _, inputs, output: x0_nets.append(output.x0_hat.detach().clone()))
    module.listeners.append(lambda sampler, step, x0_hat: x0_hats.append(x0_hat))
    guidance = module.guidance
    module.guidance = lambda loss, *args: norms.append(loss.detach()) or guidance(loss, *args)

    noise = ReplayedDraws([data["x_init"], *data["noise"][:-1]])  # the last draw is not used
    x = module.sample(torch.from_numpy(data["y"]), module.operator, noise)

    assert not noise.draws
    for recorded, ours in (("x0_net", x0_nets), ("x0_guided", x0_hats)):
        recorded, ours = share(data[recorded], module.steps), share(ours, module.steps)
        np.testing.assert_allclose(ours, recorded, atol=TOLERANCE)
    np.testing.assert_allclose(torch.cat(norms), data["norm"], atol=TOLERANCE)
    np.testing.assert_allclose(torch.stack([*states[1:], x]), data["x_path"], atol=TOLERANCE)
    np.testing.assert_allclose(x, data["x_final"], atol=TOLERANCE)
