"""The exact prior of the Helmholtz equation, and what guidance makes of it."""

import pytest
import torch
from torch import Tensor

from equireg.metrics import relative_l2
from equireg.noise import SampleNoise, Stream
from equireg.operators import Sensors
from equireg.pde.generate import HelmholtzLaw
from equireg.pde.linear_mmse import HelmholtzFields
from equireg.pde.random_fields import exponential_covariance
from equireg.priors.gaussian_field import GaussianFieldPrior
from lightning_modules import FunDPS

SIZE = 12


@pytest.fixture(scope="module")
def law() -> HelmholtzFields:
    return HelmholtzFields(SIZE)


@pytest.fixture(scope="module")
def prior(law: HelmholtzFields) -> GaussianFieldPrior:
    return GaussianFieldPrior(law, "helmholtz")


@pytest.fixture(scope="module")
def fields() -> Tensor:
    return HelmholtzLaw(SIZE).sample(range(24), 0, "test")


@pytest.mark.parametrize("noise", ["exponential", "white"])
def test_its_denoiser_is_the_conditional_mean(noise: str, law: HelmholtzFields, fields: Tensor) -> None:
    """mu + C (C + sigma^2 K)^-1 (x - mu), with the matrices written out."""
    prior = GaussianFieldPrior(law, "helmholtz", noise, noise_scale=0.3)
    count = 2 * SIZE**2
    unit = torch.eye(count, dtype=torch.float64).view(count, 2, SIZE, SIZE)
    scale = prior.normalizer.std.double() / 0.5
    covariance = (law.covariance(unit / scale) / scale).flatten(1)
    one = torch.eye(SIZE**2, dtype=torch.float64)
    k = torch.block_diag(*2 * [exponential_covariance(SIZE, 0.3) if noise == "exponential" else one])
    x = prior.normalize(fields[:3].double()) + torch.randn(3, 2, SIZE, SIZE, dtype=torch.float64)
    mean = prior.normalize(law.mean)
    expected = mean + (covariance @ torch.linalg.solve(covariance + 0.49 * k, (x - mean).flatten(1).T)).T.view_as(x)
    torch.testing.assert_close(prior.denoise(x, 0.7), expected, rtol=0, atol=1e-8)


def test_its_samples_have_the_law_of_the_fields(law: HelmholtzFields, prior: GaussianFieldPrior) -> None:
    noise = SampleNoise(range(800), 0, Stream.SAMPLER)
    steps = prior.steps(30)
    x = steps[0].sigma * prior.draw_noise(noise, (2, SIZE, SIZE), like=torch.zeros(1, dtype=torch.float64))
    for step in steps:
        x, _ = prior.heun_step(x, step)
    middle = SIZE // 2 * SIZE + SIZE // 2
    points = torch.tensor([middle, middle + 1, middle + SIZE**2])  # a twice, u once
    values = prior.denormalize(x).flatten(1)[:, points]
    covariance = law.between(points)
    spread = covariance.diagonal().sqrt()
    torch.testing.assert_close(
        values.T @ values / 800 / spread / spread[:, None], covariance / spread / spread[:, None], rtol=0, atol=0.15
    )  # 800 samples


def test_guidance_brings_fundps_towards_the_posterior_mean(
    law: HelmholtzFields, prior: GaussianFieldPrior, fields: Tensor
) -> None:
    """The exact posterior mean is the bar that nothing passes on average; more steps come nearer to it."""
    indices = list(range(len(fields)))
    operator = Sensors("inverse", count=20).realize((2, SIZE, SIZE), indices)
    y = operator(fields)

    def error(x_hat: Tensor) -> float:
        return relative_l2(x_hat[:, 0], fields[:, 0].to(x_hat)).mean().item()

    best = error(law.estimate(y, operator.positions))
    errors = [error(FunDPS(prior, operator, num_steps, weight=40.0)(y, indices, operator)) for num_steps in (15, 60)]
    assert best < errors[1] < errors[0] < 1


def test_a_field_of_another_size_is_refused(prior: GaussianFieldPrior) -> None:
    with pytest.raises(ValueError, match=r"fields are \(2, 16, 16\), the Gaussian prior is on \(2, 12, 12\)"):
        prior.check_shape((2, 16, 16))
