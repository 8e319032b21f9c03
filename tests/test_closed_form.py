"""Every sampler draws from a posterior that is known: an 8x8 Gaussian field, half of it measured."""

import pytest

from benchmarks.closed_form import LATENT_SAMPLERS, PIXEL_SAMPLERS, TRUE_LIKELIHOOD, Errors, Problem
from lightning_modules import DAPS

CHAINS = 256

STEPS = {"SITCOM": 20, "DAPS": 20, "LatentDAPS": 20}
"""Samplers with an inner loop need fewer steps than the 100 of the others."""


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem("random_inpainting", CHAINS)


@pytest.mark.parametrize("name", [*PIXEL_SAMPLERS, *LATENT_SAMPLERS])
def test_samples_lie_around_the_posterior_mean(name: str, problem: Problem) -> None:
    """Within 0.6 posterior standard deviations, where the prior mean is 1.8 away; spread within a factor of two."""
    steps = 5 if "exact" in name else STEPS.get(name.split(",")[0], 100)
    errors = problem.errors(problem.draw(problem.sampler(name, steps)))
    assert errors.mean < 0.6
    assert 0.5 < errors.spread < 2


def test_daps_tends_to_the_posterior_as_its_chain_grows(problem: Problem) -> None:
    def errors(mcmc_steps: int) -> Errors:
        settings = TRUE_LIKELIHOOD | {"prior_solver": "exact", "mcmc_steps": mcmc_steps}
        return problem.errors(problem.draw(DAPS(problem.prior(), problem.operator, 5, **settings)))

    exact = problem.errors(problem.exact_draws())  # what 256 samples without any error are off by: 0.06 and 0.32
    few, some, many = (errors(mcmc_steps) for mcmc_steps in (3, 30, 100))
    assert few.mean > 5 * some.mean
    assert some.mean > 2 * many.mean
    assert many.mean < 1.5 * exact.mean
    assert few.covariance > 3 * some.covariance > 3 * many.covariance
    assert many.covariance < 1.15 * exact.covariance
    assert abs(many.spread - 1) < 0.03


def test_the_published_approximation_of_the_prior_widens_daps(problem: Problem) -> None:
    """x0_hat of the probability flow has the prior's variance already; the chain adds sigma^2 to it at every level."""
    settings = TRUE_LIKELIHOOD | {"mcmc_steps": 50}
    flow, denoised = (
        problem.errors(problem.draw(DAPS(problem.prior(), problem.operator, 30, ode_steps=ode_steps, **settings)))
        for ode_steps in (5, 1)  # one Euler step leads to E[x_0 | x_t]
    )
    assert flow.spread > 1.5
    assert denoised.spread < 0.85 * flow.spread
