"""DiffStateGrad's projection, and DPS and ReSample under it, reproduce the recorded runs of the official code."""

from pathlib import Path

import numpy as np
import pytest
import torch

from equireg.priors import VPSchedule
from equireg.state_projection import StateProjection, rank
from lightning_modules import DPS
from tests.golden import parametrize_golden
from tests.golden_latent import ReplayedNoise as ReplayedDraws
from tests.test_golden_dps import TOLERANCE, RecordedOperator, ReplayedNoise, make_prior
from tests.test_golden_resample import make_sampler, spy

RESAMPLE_TOLERANCE = 1e-4
"""AdamW divides the projected gradient by its own size: where that is rounding, so is the step (resample.md)."""


@parametrize_golden("diffstategrad_projection*.npz")
def test_golden_projection(golden: Path) -> None:
    data = dict(np.load(golden))
    for case in (name[1:] for name in data if name.startswith("z")):
        state, gradient = torch.from_numpy(data[f"z{case}"]), torch.from_numpy(data[f"grad{case}"])
        variance = float(data[f"cutoff{case}"])
        values = torch.linalg.svdvals(state)
        np.testing.assert_allclose(values[0].numpy(), data[f"sv{case}"], atol=TOLERANCE)
        assert rank(values, variance).tolist() == [int(data[f"rank{case}"])]
        projected = StateProjection(variance)(gradient, state, 0)
        np.testing.assert_allclose(projected.numpy(), data[f"proj{case}"], atol=TOLERANCE)


@parametrize_golden("diffstategrad_dps*.npz")
def test_golden_diffstategrad_dps_reproduces_every_step(golden: Path) -> None:
    data = dict(np.load(golden))
    prior = make_prior(data)
    module = DPS(prior, RecordedOperator(data), num_steps=len(data["betas"]), zeta=float(data["scale"]))
    module.steps = list(VPSchedule(prior.alpha_bar, [int(t) for t in data["timestep_map"]]))
    projection = StateProjection(float(data["cutoff"]), int(data["period"]))
    states, raw, projected = [], [], []

    def transform(gradient: torch.Tensor, state: torch.Tensor, iteration: int) -> torch.Tensor:
        states.append(state.detach())
        raw.append(gradient)
        projected.append(projection(gradient, state, iteration))
        return projected[-1]

    transform.everything = False
    module.gradient_transforms.append(transform)
    with torch.enable_grad():
        x = module.sample(torch.from_numpy(data["y"]), module.operator, ReplayedNoise(data))

    ranks = [int(rank(torch.linalg.svdvals(state), projection.variance)) for state in states]
    fires = [projection.period > 0 and k % projection.period == 0 for k in range(len(states))]
    assert [r if fire else -1 for r, fire in zip(ranks, fires, strict=True)] == data["rank"].tolist()
    for recorded, ours in (("grad_raw", raw), ("grad", projected)):
        np.testing.assert_allclose(torch.stack(ours).numpy(), data[recorded], atol=TOLERANCE, err_msg=recorded)
    states = torch.stack([*states[1:], x]).numpy()
    np.testing.assert_allclose(states, data["x_path"], atol=TOLERANCE)
    np.testing.assert_allclose(x.numpy(), data["x_final"], atol=TOLERANCE)


@pytest.mark.filterwarnings("ignore:tolerance=")  # the published one is below the noise
@parametrize_golden("diffstategrad_resample*.npz")
def test_golden_diffstategrad_resample_reproduces_every_step(golden: Path) -> None:
    data = dict(np.load(golden))
    module = make_sampler(data, pixel_lr=float(data["pixel_lr"]), latent_lr=float(data["latent_lr"]))
    projection = StateProjection(float(data["var_cutoff"]), int(data["period"]))
    module.gradient_transforms.append(projection)
    ranks = []
    decompose = projection._decompose

    def recorded(state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if projection._last is None or state is not projection._last[0]:
            ranks.append([decompose(state)[2].item(), state.shape[-1]])
        return decompose(state)

    projection._decompose = recorded
    guided, resampled, pixel, latent, optimized = (
        spy(module, name) for name in ("guided_step", "resample", "pixel_stage", "latent_stage", "optimize")
    )
    noise = ReplayedDraws([data["z_T"], *data["noise_resample"]])
    with torch.enable_grad():
        module.sample(torch.from_numpy(data["y"]), module.operator, noise)

    assert not noise.draws
    assert ranks == data["proj_rank"].tolist()
    assert [args[2].j for args, _ in resampled] == data["event_index"].tolist()
    (entering, *_), leaving = latent[-1]
    ours = {
        "event_z_out": [z for _, z in resampled],
        "z_traj": [args[0] for args, _ in guided[1:]] + [entering],
        "z_before_final": [entering],
        "latent_in": [args[0] for args, _ in latent],
        "latent_out": [z for _, z in latent],
        "z_final": [leaving],
        "x_hat": [module.prior.decode(leaving)],
    }
    if pixel:
        (x_in, *_), x_out = optimized[0]
        ours |= {"pixel_in": [x_in], "pixel_out": [x_out]}
    for name, values in ours.items():
        values = torch.stack(values).detach().numpy().reshape(data[name].shape)
        np.testing.assert_allclose(values, data[name], atol=RESAMPLE_TOLERANCE, err_msg=name)
