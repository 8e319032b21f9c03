"""DiffStateGrad: what the projection does to a gradient, and how it is attached."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from callbacks import EquiReg, StateGrad
from equireg.mpe import Encoder
from equireg.operators import SuperResolution
from equireg.priors import VPPrior
from equireg.regularizer import Regularizer, WeightSchedule
from equireg.state_projection import StateProjection, rank
from lightning_modules import DPS
from tests.test_samplers import SAMPLERS, measure, restore
from tests.tiny_run import TinyData, TinySampler, predict


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_rank(r: int, channels: int = 3, height: int = 12, width: int = 9) -> Tensor:
    """A state (1, C, H, W) whose channels have r equal singular values."""
    left, right = torch.linalg.qr(randn(channels, height, r)).Q, torch.linalg.qr(randn(channels, width, r, seed=1)).Q
    return (left @ right.mT)[None]


def test_a_projection_keeps_the_states_rows_and_columns_and_nothing_else() -> None:
    state, gradient = of_rank(2), randn(1, 3, 12, 9, seed=2)
    projected = StateProjection(0.99, rank_rule="per_channel_mean")(gradient, state, 0)
    columns, rows = state @ state.mT, state.mT @ state  # orthogonal projectors: the singular values are one
    torch.testing.assert_close(projected, columns @ gradient @ rows)
    assert projected.norm() < 0.9 * gradient.norm()


@pytest.mark.parametrize("rule", ["official", "per_channel_mean"])
def test_projecting_twice_is_projecting_once(rule: str) -> None:
    projection, state = StateProjection(0.7, rank_rule=rule), randn(2, 3, 12, 9)
    once = projection(randn(2, 3, 12, 9, seed=1), state, 0)
    torch.testing.assert_close(projection(once, state, 0), once)


def test_the_whole_energy_projects_nothing() -> None:
    gradient = randn(1, 3, 8, 8, seed=1)
    torch.testing.assert_close(StateProjection(1.0)(gradient, randn(1, 3, 8, 8), 0), gradient)


def test_images_have_their_own_ranks() -> None:
    states = torch.cat([of_rank(2), randn(1, 3, 12, 9, seed=5), of_rank(7)])
    gradient = randn(3, 3, 12, 9, seed=6)
    for rule in ("official", "per_channel_mean"):
        projection = StateProjection(0.9, rank_rule=rule)
        alone = [projection(gradient[i : i + 1], states[i : i + 1], 0) for i in range(3)]
        torch.testing.assert_close(projection(gradient, states, 0), torch.cat(alone))


def test_the_documented_rank_is_the_mean_over_the_channels_and_the_official_one_larger() -> None:
    energy = torch.tensor([[[6.0, 2, 1, 1], [9, 0.5, 0.3, 0.2], [2.5, 2.5, 2.5, 2.5]]])
    # 0.8 of each channel's 10: the first 2, 1 and 4; of all 30: 24, which the first 10 values of the row hold
    assert rank(energy.sqrt(), 0.8, "per_channel_mean").tolist() == [2]
    assert rank(energy.sqrt(), 0.8, "official").tolist() == [3]


def test_a_rank_is_at_least_one_and_at_most_full() -> None:
    for channels in (1, 2, 3, 4):
        for rule in ("official", "per_channel_mean"):
            values = torch.tensor([[[1.0, 0, 0]] + [[0.0, 0, 0]] * (channels - 1)])
            assert rank(values, 0.5, rule).tolist() == [1]
            assert rank(torch.ones(1, channels, 3), 1.0, rule).tolist() == [3]


def test_a_period_projects_every_so_many_iterations() -> None:
    state, gradient = randn(1, 3, 8, 8), randn(1, 3, 8, 8, seed=1)
    for period, fires in ((1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3]), (0, [])):
        projection = StateProjection(0.5, period)
        assert [k for k in range(5) if not torch.equal(projection(gradient, state, k), gradient)] == fires


def test_a_state_changed_in_place_is_decomposed_again() -> None:
    projection, state, gradient = StateProjection(0.5), randn(1, 3, 8, 8), randn(1, 3, 8, 8, seed=1)
    before = projection(gradient, state, 0)
    assert torch.equal(projection(gradient, state, 1), before)
    state.copy_(randn(1, 3, 8, 8, seed=2))
    torch.testing.assert_close(projection(gradient, state, 2), StateProjection(0.5)(gradient, state.clone(), 0))
    assert not torch.allclose(projection(gradient, state, 2), before)


def test_a_diverged_image_leaves_the_others_alone() -> None:
    state, gradient = randn(2, 3, 8, 8), randn(2, 3, 8, 8, seed=1)
    clean = StateProjection(0.5)(gradient, state.clone(), 0)
    state[1, 0, 0, 0] = torch.nan
    torch.testing.assert_close(StateProjection(0.5)(gradient, state, 0)[0], clean[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variance": 0.0}, "variance=0.0 must be above 0 and at most 1"),
        ({"variance": 1.1}, "variance=1.1 must be above 0 and at most 1"),
        ({"period": -1}, "period=-1 must not be negative"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StateGrad(**arguments)


def dps(prior: VPPrior) -> DPS:
    return DPS(prior, SuperResolution(4), num_steps=3, zeta=0.5)


def test_the_penalty_is_projected_together_with_the_misfit(
    tiny_prior: VPPrior, encoder: Encoder, images: Tensor
) -> None:
    module = dps(tiny_prior)
    module.attach(Regularizer(encoder, "hflip", WeightSchedule(5.0)))
    projection, x_t = StateProjection(0.5), images[:2].clone().requires_grad_()
    loss = x_t.square().flatten(1).sum(1)
    penalty = (x_t**3).flatten(1).sum(1)
    whole = module.guidance(loss + penalty, x_t)
    module.gradient_transforms.append(projection)
    loss = x_t.square().flatten(1).sum(1) + (x_t**3).flatten(1).sum(1)
    torch.testing.assert_close(module.guidance(loss, x_t), projection(whole, x_t, 0))


@pytest.mark.parametrize("project", ["measurement", "all"])
def test_terms_that_do_not_measure_are_projected_only_when_asked(
    project: str, tiny_prior: VPPrior, images: Tensor
) -> None:
    module, x_t = dps(tiny_prior), images[:2].clone().requires_grad_()

    def guidance(**aside: Tensor) -> Tensor:
        return module.guidance(x_t.square().flatten(1).sum(1), x_t, **aside)

    def glue() -> Tensor:
        return (x_t**3).flatten(1).sum(1)

    measured, whole = guidance(), guidance(aside=glue())
    torch.testing.assert_close(whole, measured + 3 * x_t.detach().square())
    projection = StateGrad(0.5, project=project).projection
    module.gradient_transforms.append(projection)
    expected = projection(measured, x_t, 0) + (whole - measured)
    if project == "all":
        expected = projection(whole, x_t, 0)
    torch.testing.assert_close(guidance(aside=glue()), expected)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_image_of_a_sampler_moves_by_its_own_projection_or_the_sampler_is_refused(
    name: str, tiny_prior: VPPrior, images: Tensor
) -> None:
    # float64: the steps with a random network amplify the last bits of float32
    module = SAMPLERS[name](copy.deepcopy(tiny_prior).double(), SuperResolution(4))
    if not module.takes_state_grad:
        with pytest.raises(ValueError, match=f"data gradient; {type(module).__name__} offers none"):
            StateGrad().setup(None, module, "predict")
        return
    heard = []
    module.listeners.append(lambda sampler, step, x0_hat: heard.append(x0_hat))

    def estimate(indices: list[int]) -> Tensor:
        """The last estimate of the chain itself: the codes of a decoder hide small changes in the images."""
        restore(module, images.double(), indices)
        return heard[-1]

    plain = estimate([0, 1])
    module.gradient_transforms.append(StateProjection(0.5))
    together = estimate([0, 1])
    assert (together - plain).abs().amax((1, 2, 3)).min() > 1e-4
    alone = torch.cat([estimate([i]) for i in (0, 1)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-8)


def test_the_callback_attaches_and_takes_away_the_projection(
    tmp_path: Path, tiny_prior: VPPrior, encoder: Encoder
) -> None:
    data = TinyData(count=2, shape=(1, 16, 16))
    module, callback = dps(tiny_prior), StateGrad(0.5)
    attached = []
    module.listeners.append(lambda sampler, step, x0_hat: attached.append(list(sampler.gradient_transforms)))
    predict(tmp_path / "run", callback, EquiReg(encoder, weight=1.0), sampler=module, data=data)
    assert attached == [[callback.projection]] * 3  # in every step of the one batch
    assert module.gradient_transforms == []


def test_a_sampler_without_a_data_gradient_is_refused_before_it_restores(tmp_path: Path) -> None:
    sampler = TinySampler()
    with pytest.raises(ValueError, match="StateGrad projects a sampler's data gradient; TinySampler offers none"):
        predict(tmp_path / "run", StateGrad(), sampler=sampler)
    assert not sampler.restored


def test_two_projections_are_refused(tmp_path: Path, tiny_prior: VPPrior) -> None:
    module = dps(tiny_prior)
    with pytest.raises(ValueError, match="a sampler takes one StateGrad"):
        predict(tmp_path / "run", StateGrad(), StateGrad(), sampler=module, data=TinyData(shape=(1, 16, 16)))
    assert module.gradient_transforms == []


def test_dps_hands_over_the_number_of_its_step(tiny_prior: VPPrior, images: Tensor) -> None:
    module, iterations = dps(tiny_prior), []

    def transform(gradient: Tensor, state: Tensor, iteration: int) -> Tensor:
        iterations.append(iteration)
        return gradient

    transform.everything = False
    module.gradient_transforms.append(transform)
    operator, y = measure(module.operator, images[:1], [0])
    module(y, [0], operator)
    assert iterations == [0, 1, 2]
