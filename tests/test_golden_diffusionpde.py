"""DiffusionPDE reproduces the recorded run, step by step."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from equireg.operators import Sensors
from equireg.priors import SigmaStep
from lightning_modules import DiffusionPDE
from tests.golden import parametrize_golden
from tests.golden_fields import ReplayedNoise, check, residual_of, sensors_at, tiny_prior

golden_files = parametrize_golden("diffusionpde*.npz")


@golden_files
@pytest.mark.parametrize("merge_losses", [True, False], ids=["merged", "separate"])
def test_golden_diffusion_pde_reproduces_every_step(golden: Path, merge_losses: bool) -> None:
    data = dict(np.load(golden))
    gt = torch.from_numpy(data["gt"])[None]
    std = (0.5 * data["scale"]).tolist()  # ours scales to a standard deviation of 0.5
    prior = tiny_prior(data, gt.shape[-1], std=std, mean=(0.0, 0.0), noise="white")
    operator = sensors_at(np.stack([data["mask_a"], data["mask_u"]]), 1)
    zeta_a, zeta_u, zeta_pde = data["zeta"].tolist()
    module = DiffusionPDE(
        prior,
        operator,
        num_steps=int(data["iterations"]),
        zeta_a=zeta_a,
        zeta_u=zeta_u,
        zeta_pde=zeta_pde,
        residual=residual_of(str(data["pde"])),
        sigma_max=float(data["sigma_max"]),
        sigma_min=float(data["sigma_min"]),
        rho=float(data["rho"]),
        merge_losses=merge_losses,
    )
    sigmas = [module.steps[0].sigma, *(step.sigma_next for step in module.steps)]
    np.testing.assert_allclose(sigmas, data["sigmas"], rtol=1e-12)
    starts, denoised = [], []
    heun_step = prior.heun_step

    def spy(x: Tensor, step: SigmaStep) -> tuple[Tensor, Tensor]:
        result = heun_step(x, step)
        starts.append(x.detach())
        denoised.append(result[1].detach())
        return result

    prior.heun_step = spy
    with torch.enable_grad():
        x = module.sample(operator(gt), operator, ReplayedNoise(data["latents"]))

    saved = data["steps_saved"].tolist()
    check(torch.stack(starts)[saved], data["x_start_of_step"], "x_start_of_step")
    check(torch.stack(denoised)[saved], data["xN"], "xN")
    check(prior.normalize(x), data["x_final"], "x_final")
    error = torch.linalg.vector_norm(x - gt, dim=(2, 3)) / torch.linalg.vector_norm(gt, dim=(2, 3))
    check(error[0], data["rel_error"], "rel_error")


@golden_files
def test_golden_diffusion_pde_sensors_are_the_published_ones(golden: Path) -> None:
    """numpy's legacy generator, one seed per channel."""
    data = dict(np.load(golden))
    for mask, seed, task in zip(
        (data["mask_a"], data["mask_u"]), data["mask_seeds"], ("forward", "inverse"), strict=True
    ):
        operator = Sensors(task, count=int(mask.sum()), shared=True, shared_seed=int(seed))
        channel = operator.observed[0]
        np.testing.assert_array_equal(operator.realize(data["gt"].shape, [5]).mask[0, channel], mask)
