"""Posterior samplers against a posterior that is known: a Gaussian prior, a linear operator, Gaussian noise.

    python benchmarks/closed_form.py [--chains 1024] [--steps 10 30 100] [--samplers DPS DAPS ...]

Draws ``chains`` samples of the posterior of one measurement of an 8x8 field with every sampler and prints, per operator
and number of steps, how far their mean and covariance lie from the true ones. A further sampler is one line in
PIXEL_SAMPLERS or LATENT_SAMPLERS.
"""

import argparse
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import equireg  # noqa: F401  its guard must run before lightning is imported
from equireg.folding import fold, unfold
from equireg.gaussian import posterior
from equireg.operators import GaussianDeblur, LinearOperator, RandomInpainting
from equireg.priors import GaussianPrior, LatentPrior
from lightning_modules import (
    DAPS,
    DDRM,
    DPS,
    MCG,
    MPGD,
    MPGDAE,
    PSLD,
    SITCOM,
    DiffPIR,
    LatentDAPS,
    PosteriorSampler,
    ReSample,
)

SHAPE = (1, 8, 8)
SIGMA_Y = 0.1

OPERATORS: dict[str, Callable[[], LinearOperator]] = {
    "gaussian_deblur": lambda: GaussianDeblur(5, 1.0, sigma_y=SIGMA_Y),
    "random_inpainting": lambda: RandomInpainting(sigma_y=SIGMA_Y),
}

TRUE_LIKELIHOOD = {"tau": SIGMA_Y, "likelihood_scale": 0.5, "time_map": "native", "eta": 1e-3, "momentum": 0.9}
"""For DAPS: the likelihood that the measurement has, a network that is told the right time, a chain that goes far."""

PIXEL_SAMPLERS: dict[str, Callable[[GaussianPrior, LinearOperator, int], PosteriorSampler]] = {
    "DPS": lambda prior, operator, steps: DPS(prior, operator, steps),
    "MCG": lambda prior, operator, steps: MCG(prior, operator, steps),
    "DDRM": lambda prior, operator, steps: DDRM(prior, operator, steps),
    "DiffPIR": lambda prior, operator, steps: DiffPIR(prior, operator, steps),
    "MPGD": lambda prior, operator, steps: MPGD(prior, operator, steps),
    "MPGDAE": lambda prior, operator, steps: MPGDAE(prior, operator, Folding(), steps),
    "SITCOM": lambda prior, operator, steps: SITCOM(prior, operator, steps),
    "DAPS": lambda prior, operator, steps: DAPS(prior, operator, steps),
    "DAPS, true likelihood": lambda prior, operator, steps: DAPS(prior, operator, steps, **TRUE_LIKELIHOOD),
    "DAPS, true likelihood, exact prior": lambda prior, operator, steps: DAPS(
        prior, operator, steps, prior_solver="exact", **TRUE_LIKELIHOOD
    ),
}

LATENT_SAMPLERS: dict[str, Callable[[LatentPrior, LinearOperator, int], PosteriorSampler]] = {
    "PSLD": lambda prior, operator, steps: PSLD(prior, operator, steps),
    "ReSample": lambda prior, operator, steps: ReSample(prior, operator, steps, tolerance=SIGMA_Y),
    "LatentDAPS": lambda prior, operator, steps: LatentDAPS(prior, operator, steps),
    "LatentDAPS, true likelihood, exact prior": lambda prior, operator, steps: LatentDAPS(
        prior, operator, steps, mcmc_steps=100, gradient_clip=math.inf, prior_solver="exact", **TRUE_LIKELIHOOD
    ),
}


class Folding(nn.Module):
    """An autoencoder without loss: 2x2 pixels into channels, an orthogonal map."""

    family, channels, latent_channels, factor, scale_factor = "kl", SHAPE[0], 4 * SHAPE[0], 2, 1.0

    def check_shape(self, shape: tuple[int, int, int]) -> None:
        """Accepts every shape."""

    def encode(self, x: Tensor) -> Tensor:
        return fold(x, 2)

    def decode(self, z: Tensor) -> Tensor:
        return unfold(z, 2)

    def sample(self, x: Tensor, noise: object) -> Tensor:
        return fold(x, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x


class OneStream:
    """Noise of all chains from one generator; the chains have one measurement and need no streams of their own."""

    def __init__(self, chains: int, seed: int) -> None:
        self.chains = chains
        self.generator = torch.Generator().manual_seed(seed)

    def randn(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        return torch.randn((self.chains, *shape), generator=self.generator).to(like)


@dataclass(frozen=True)
class Errors:
    """Distance of samples from the posterior.

    Attributes:
        mean: ||mean - true mean|| over the root of the trace of the true covariance.
        covariance: ||covariance - true covariance|| over ||true covariance||, Frobenius norms.
        spread: root of the ratio of the traces; 1 is right.
    """

    mean: float
    covariance: float
    spread: float


class Problem:
    """A smooth Gaussian field, measured once.

    Args:
        operator: name in OPERATORS.
        chains: how many samples are drawn of its posterior.
        seed: of the field, the measurement and the samples.
    """

    def __init__(self, operator: str, chains: int, seed: int = 0) -> None:
        channels, height, width = SHAPE
        n = channels * height * width
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        positions = torch.stack([rows, columns], -1).view(n, 2).double()
        squared = (positions[:, None] - positions[None]).square().sum(-1)
        self.covariance = 0.08 * torch.exp(-squared / (2 * 2.0**2)) + 0.02 * torch.eye(n).double()
        self.mean = 0.2 * torch.sin(positions[:, 0] / 3)
        self.chains = chains
        self.seed = seed

        self.operator = OPERATORS[operator]().realize(SHAPE, [seed] * chains)
        basis = torch.eye(n).view(n, *SHAPE)
        matrix = torch.cat([self.operator(row.expand(chains, *SHAPE))[:1] for row in basis]).flatten(1).T.double()
        generator = torch.Generator().manual_seed(seed)
        x = self.mean + torch.linalg.cholesky(self.covariance) @ torch.randn(n, generator=generator).double()
        y = matrix @ x
        y = y + SIGMA_Y * torch.randn(len(y), generator=generator).double()
        self.y = y.float().view(1, *self.operator.y_shape(SHAPE)).expand(chains, -1, -1, -1)
        self.posterior_mean, self.posterior_covariance = posterior(self.mean, self.covariance, matrix, y, SIGMA_Y)

    def prior(self) -> GaussianPrior:
        """The prior of the field."""
        return GaussianPrior(self.mean.view(SHAPE).float(), self.covariance.float())

    def latent_prior(self) -> LatentPrior:
        """The same on folded fields."""
        n = len(self.mean)
        permutation = fold(torch.eye(n).double().view(n, *SHAPE), 2).flatten(1)
        mean = fold(self.mean.view(1, *SHAPE), 2)[0]
        covariance = permutation.T @ self.covariance @ permutation
        return LatentPrior(GaussianPrior(mean.float(), covariance.float()), Folding())

    def sampler(self, name: str, steps: int) -> PosteriorSampler:
        """The sampler of this name with so many steps."""
        if name in PIXEL_SAMPLERS:
            return PIXEL_SAMPLERS[name](self.prior(), self.operator, steps)
        return LATENT_SAMPLERS[name](self.latent_prior(), self.operator, steps)

    def draw(self, sampler: PosteriorSampler) -> Tensor:
        """``chains`` samples (B, C, H, W)."""
        with torch.enable_grad():
            return sampler.sample(self.y, self.operator, OneStream(self.chains, self.seed)).detach()

    def exact_draws(self) -> Tensor:
        """``chains`` samples of the true posterior: what is left to a sampler without error."""
        root = torch.linalg.cholesky(self.posterior_covariance)
        return self.posterior_mean + OneStream(self.chains, self.seed).randn((len(root),), like=root) @ root.T

    def errors(self, samples: Tensor) -> Errors:
        """How far the mean and the covariance of samples are off."""
        samples = samples.flatten(1).double()
        return self.errors_of(samples.mean(0), torch.cov(samples.T))

    def errors_of(self, mean: Tensor, covariance: Tensor) -> Errors:
        """How far a mean (n,) and a covariance (n, n) are off."""
        trace = self.posterior_covariance.trace()
        return Errors(
            mean=((mean - self.posterior_mean).norm() / trace.sqrt()).item(),
            covariance=((covariance - self.posterior_covariance).norm() / self.posterior_covariance.norm()).item(),
            spread=(covariance.trace() / trace).sqrt().item(),
        )


def sampler_rows(problem: Problem, names: list[str], all_steps: list[int]) -> Iterator[tuple[str, Errors]]:
    """Name, number of steps and network passes of every run, with its errors."""
    for name in names:
        for steps in all_steps:
            sampler = problem.sampler(name, steps)
            errors = problem.errors(problem.draw(sampler))
            yield f"{name} | {steps} | {sampler.evaluations.forward} + {sampler.evaluations.backward}", errors


def chain_rows(problem: Problem, lengths: list[int]) -> Iterator[tuple[str, Errors]]:
    """DAPS without approximation, at five noise levels, over the length of its inner chain."""
    for length in lengths:
        settings = TRUE_LIKELIHOOD | {"prior_solver": "exact", "mcmc_steps": length}
        sampler = DAPS(problem.prior(), problem.operator, 5, **settings)
        errors = problem.errors(problem.draw(sampler))
        yield f"DAPS, chains of {length} | 5 | {sampler.evaluations.forward} + 0", errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chains", type=int, default=1024)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 30, 100])
    parser.add_argument("--samplers", nargs="*", default=[*PIXEL_SAMPLERS, *LATENT_SAMPLERS])
    parser.add_argument("--chain_lengths", type=int, nargs="*", default=[1, 3, 10, 30, 100])
    options = parser.parse_args()
    torch.set_num_threads(1)
    for operator in OPERATORS:
        print(f"\n| {operator} | steps | network passes | mean | covariance | spread |\n|{' --- |' * 6}")
        problem = Problem(operator, options.chains)
        rows = [("exact draws | | ", problem.errors(problem.exact_draws()))]
        rows += [("none: the prior mean | | ", problem.errors_of(problem.mean, problem.covariance))]
        samplers = sampler_rows(problem, options.samplers, options.steps)
        for text, errors in itertools.chain(rows, samplers, chain_rows(problem, options.chain_lengths)):
            print(f"| {text} | {errors.mean:.3f} | {errors.covariance:.2f} | {errors.spread:.2f} |", flush=True)


if __name__ == "__main__":
    main()
