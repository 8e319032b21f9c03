"""Several restorations of a measurement, of which one is kept per image."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from callbacks import BestOf, PredictionWriter, TensorBoardInspector
from equireg.noise import Noise
from equireg.operators import Operator, PhaseRetrieval
from equireg.priors import Step, VPPrior
from equireg.runs import read_run
from equireg.selection import Selection
from lightning_modules import DPS, PosteriorSampler
from tests.tiny_run import STEPS, TinyData, TinyPrior, TinySampler, predict

GOOD_DRAWS = {0: 2, 1: 0, 2: 3, 3: 1, 4: 2}
"""The draw in which the image of every index is restored."""


class Lucky(PosteriorSampler):
    """Restores images all at one value, the nearer to y's the nearer the draw is to the image's good one."""

    def __init__(self, operator: Operator, diverges: bool = False) -> None:
        super().__init__(TinyPrior(), operator)
        self.diverges = diverges

    def sample(self, y: Tensor, operator: Operator, noise: Noise) -> Tensor:
        off = [abs(d - GOOD_DRAWS[i]) for i, d in zip(self.problem.indices, self.problem.draws, strict=True)]
        x0 = y + torch.tensor(off).view(-1, 1, 1, 1)
        self.emit(Step(0, 1, alpha_bar=0.5, beta=0.1), x0)
        return torch.where(x0.sub(y).flatten(1).amax(1).view(-1, 1, 1, 1) == 1, torch.nan, x0) if self.diverges else x0


class Identity(Operator):
    def forward(self, x: Tensor) -> Tensor:
        return x


def restored(module: PosteriorSampler, y: Tensor, indices: list[int], truth: Tensor | None = None) -> Tensor:
    operator = module.operator.realize(tuple(y.shape[1:]), indices)
    return module.best_restoration(y, indices, operator, [0] * len(indices), truth)


@pytest.mark.parametrize("indices", [[0, 1, 2, 3, 4], [3], [4, 2]], ids=str)
@pytest.mark.parametrize("diverges", [False, True], ids=["finite", "some diverge"])
def test_every_image_keeps_its_own_best_restoration(indices: list[int], diverges: bool) -> None:
    module = Lucky(Identity(), diverges)
    module.selection = Selection(runs=4)
    y = torch.linspace(-1, 1, len(indices)).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    assert torch.equal(restored(module, y, indices), y)


def test_the_oracle_keeps_what_is_nearest_to_the_truth() -> None:
    module = Lucky(Identity())
    module.selection = Selection(runs=4, criterion="oracle_psnr")
    y = torch.full((2, 1, 4, 4), -0.9)
    truth = torch.tensor([0.1, 1.0]).view(-1, 1, 1, 1).expand(2, 1, 4, 4)  # y + 1 for the first, y + 2 for the second
    x0 = restored(module, y, [0, 0], truth)
    assert x0[:, 0, 0, 0].tolist() == pytest.approx([0.1, 1.1])


def test_one_run_is_a_plain_restoration(tiny_prior: VPPrior, images: Tensor) -> None:
    module = DPS(tiny_prior, PhaseRetrieval(), num_steps=2)
    operator = module.operator.realize((1, 16, 16), [0, 1])
    y = operator(images[:2])
    assert torch.equal(module.best_restoration(y, [0, 1], operator, [0, 0]), module(y, [0, 1], operator))


def test_runs_are_draws_that_no_other_draw_uses() -> None:
    sampler = TinySampler()
    sampler.selection = Selection(runs=3)
    operator = sampler.operator.realize((1, 12, 12), [0, 1])
    sampler.best_restoration(operator(torch.zeros(2, 1, 12, 12)), [7, 7], operator, [0, 1])
    assert sorted(sampler.restored) == [(7, draw) for draw in range(6)]


def test_the_kept_restoration_has_the_smallest_misfit_of_all(tiny_prior: VPPrior, images: Tensor) -> None:
    module = DPS(tiny_prior, PhaseRetrieval(), num_steps=3, zeta=1.0)
    operator = module.operator.realize((1, 16, 16), [0, 1, 2])
    y = operator(images[:3])

    def misfit(x0: Tensor) -> Tensor:
        return (y - operator(x0)).flatten(1).norm(dim=1)

    each = torch.stack([misfit(module(y, [0, 1, 2], operator, [run] * 3)) for run in range(4)])
    module.selection = Selection(runs=4)
    best = misfit(module.best_restoration(y, [0, 1, 2], operator, [0] * 3))
    torch.testing.assert_close(best, each.min(0).values)
    assert (best < each.max(0).values).all()


def test_a_run_says_how_it_selected_and_listeners_hear_one_chain(tmp_path: Path) -> None:
    sampler, heard = TinySampler(), []
    sampler.listeners.append(lambda module, step, x0_hat: heard.append((step.k, step.num_steps)))
    callbacks = (TensorBoardInspector(num_images=1), PredictionWriter(), BestOf(runs=4))
    predict(tmp_path / "run", *callbacks, sampler=sampler, data=TinyData(count=1))
    assert heard == [(k, 4 * STEPS) for k in range(4 * STEPS)]
    row = read_run(tmp_path / "run").rows[0]
    assert row.metrics["best_of_misfit"] == 4
    assert row.metrics["network_evaluations"] == 4 * STEPS
    assert json.loads((tmp_path / "run/summary.json").read_text())["counts"]["written"] == 1
    assert sampler.selection.runs == 1  # the callback takes away what it brought


def test_the_oracle_is_refused_where_there_is_no_truth(tmp_path: Path) -> None:
    sampler = TinySampler()
    with pytest.raises(ValueError, match="criterion='oracle_psnr' needs the true images"):
        predict(tmp_path / "run", BestOf(criterion="oracle_psnr"), sampler=sampler, data=TinyData(is_given=True))
    assert not sampler.restored


def test_zero_runs_are_refused() -> None:
    with pytest.raises(ValueError, match="runs=0 must be at least 1"):
        BestOf(runs=0)
