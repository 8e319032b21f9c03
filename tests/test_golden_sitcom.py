"""SITCOM and Equi-SITCOM reproduce the recorded runs of the official code, step by step."""

from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from equireg.groups import GROUPS
from equireg.operators import Operator, RandomInpainting
from equireg.priors import VPPrior
from equireg.regularizer import Regularizer, WeightSchedule
from lightning_modules import SITCOM
from tests.golden import ReplayedDraws, parametrize_golden
from tests.test_golden_dps import RecordedFunction, RecordedOperator, ReplayedElements, TinyNetwork

TOLERANCE = 2e-4
"""That of the files' description: the first steps of Adam are signs, which turn the last bits into whole steps."""


class ReshapedOperator(RecordedOperator):
    """The operator of the pixel-solver files, its y in the file's shape."""

    def __init__(self, data: dict[str, np.ndarray]) -> None:
        super().__init__(data)
        self.shape = data["y"].shape[1:]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).view(-1, *self.shape)


def make_operator(data: dict[str, np.ndarray]) -> Operator:
    shape = data["x_init"].shape[1:]
    if "mask" in data:
        mask = torch.from_numpy(data["mask"]).float().expand(1, shape[0], -1, -1)[:, :1]
        operator = RandomInpainting().with_parameters({"mask": mask}, shape)
    else:
        operator = ReshapedOperator(data)
    operator.sigma_y = float(data["sigma"])
    return operator


def make_penalty(data: dict[str, np.ndarray], stem: str) -> Regularizer:
    named = [name for name in stem.split("_") if name in GROUPS]
    group = named[-1] if named else "rot90" if "idx" in data and (data["idx"] == 3).any() else "hflip"
    schedule = WeightSchedule(float(data["equi_alpha"]), scale="none")
    return Regularizer(RecordedFunction(data), group, schedule, reduction="sqnorm")


@parametrize_golden("sitcom*.npz", "equi_sitcom*.npz")
def test_golden_sitcom_reproduces_every_step(golden: Path) -> None:
    data = dict(np.load(golden))
    data["x_init"] = data["x_init_a"]
    prior = VPPrior.from_network(TinyNetwork(data))
    module = SITCOM(
        prior,
        make_operator(data),
        num_steps=len(data["t_seq"]),
        inner_steps=int(data["K"]),
        learning_rate=float(data["lr"]),
        inpaint_scale=float(data["inpaint_scale"]),
        equi_steps=int(data.get("num_steps_equi", 1)),
    )
    assert [step.t for step in module.steps] == data["t_seq"].tolist()
    if "equi_alpha" in data:
        penalty = make_penalty(data, golden.stem)
        idx = data.get("idx", np.ones(data["noise"].shape[0] * module.equi_steps)).reshape(-1)
        module.attach(penalty)
        penalty.start(ReplayedElements(idx, penalty.group.pool, np.ones(len(idx))))
    evaluations, x0_hats = Counter(), []
    prior.register_forward_pre_hook(lambda _, inputs: evaluations.update([inputs[1].k]))
    module.listeners.append(lambda sampler, step, x0_hat: x0_hats.append(x0_hat))

    alpha_bar = prior.alpha_bar[-1]
    start = np.sqrt(alpha_bar) * data["x_init_a"] + np.sqrt(1 - alpha_bar) * data["x_init_b"]
    noise = ReplayedDraws([start.astype(np.float32), *data["noise"][:-1]])  # the state after the last step is not used
    with torch.enable_grad():
        x0 = module.sample(torch.from_numpy(data["y"]), module.operator, noise)

    assert not noise.draws
    assert [evaluations[k] - 1 for k in range(len(module.steps))] == data["last_step_index"].tolist()
    np.testing.assert_allclose(torch.stack(x0_hats), data["x0_used"], atol=TOLERANCE)
    np.testing.assert_allclose(x0, data["x0_final"], atol=TOLERANCE)
