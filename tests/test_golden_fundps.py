"""FunDPS and Equi-FunDPS reproduce the recorded runs, step by step."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from equireg.mpe import MPE
from equireg.regularizer import Regularizer, WeightSchedule, reduce
from lightning_modules import FunDPS
from tests.golden import parametrize_golden
from tests.golden_fields import ReplayedNoise, check, residual_of, sensors_at, tiny_prior


class RecordedFunction(MPE):
    """f(u) = conv2d(silu(conv2d(u, F1, fb1)), F2, fb2) of the second channel."""

    space = "field"

    def __init__(self, data: dict[str, np.ndarray]) -> None:
        super().__init__()
        self.data = {name: torch.from_numpy(data[name]).double() for name in ("F1", "fb1", "F2", "fb2")}

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.conv2d(x[:, 1:], self.data["F1"], self.data["fb1"], padding=1)
        return nn.functional.conv2d(nn.functional.silu(hidden), self.data["F2"], self.data["fb2"], padding=1)


class RecordedGroup:
    """One element, given as a signed permutation of the points: T on fields, S on the function's values."""

    def __init__(self, data: dict[str, np.ndarray]) -> None:
        self.t, self.t_sign = torch.from_numpy(data["T_index"]), float(data["T_sign"])
        self.s, self.s_sign = torch.from_numpy(data["S_index"]), float(data["S_sign"])

    def draw(self, noise: None, batch_size: int, device: torch.device) -> None:
        """There is one element."""

    def transform(self, x: Tensor, g: Tensor) -> Tensor:
        return self.t_sign * x.flatten(2)[..., self.t].view_as(x)

    def transform_features(self, features: Tensor, g: Tensor) -> Tensor:
        return self.s_sign * features.flatten(2)[..., self.s].view_as(features)


def recorded_penalty(data: dict[str, np.ndarray], history: list[Tensor]) -> Regularizer:
    """The penalty of the file; its unweighted values are appended to ``history``."""
    reduction = {"mse": "mse", "l2": "rms"}[str(data["loss_types"][2])]
    schedule = WeightSchedule(float(data["weights"][3]), scale="none")
    penalty = Regularizer(RecordedFunction(data), "hflip", schedule, reduction=reduction)
    penalty.group = RecordedGroup(data)
    defect = penalty.defect

    def spy(*args: object) -> Tensor:
        d = defect(*args)
        history.append(reduce(d.detach(), reduction))
        return d

    penalty.defect = spy
    return penalty


@parametrize_golden("fundps*.npz", "equi_fundps*.npz")
@pytest.mark.parametrize("merge_losses", [True, False], ids=["merged", "separate"])
def test_golden_fundps_reproduces_every_step(golden: Path, merge_losses: bool) -> None:
    data = dict(np.load(golden))
    side = data["gt"].shape[-1]
    scale = {"mean": data["norm_mean"].tolist(), "std": data["norm_std"].tolist()}
    prior = tiny_prior(data, side, noise_scale=float(data["rbf_scale"]), **scale)
    operator = sensors_at(data["masks"], len(data["gt"]))
    np.testing.assert_array_equal(operator.count[:1], data["n_obs"])
    module = FunDPS(
        prior,
        operator,
        num_steps=len(data["sigmas"]) - 1,
        sensor_loss=str(data["loss_types"][0]),
        weight=tuple(data["weights"][:2].tolist()),
        residual_weight=float(data["weights"][2]),
        residual_loss=str(data["loss_types"][1]),
        residual=residual_of(str(data["dataset"])),
        sigma_max=float(data["sigma_max"]),
        sigma_min=float(data["sigma_min"]),
        rho=float(data["rho"]),
        merge_losses=merge_losses,
    )
    sigmas = [module.steps[0].sigma, *(step.sigma_next for step in module.steps)]
    np.testing.assert_allclose(sigmas, data["sigmas"], rtol=1e-12)
    penalties = []
    if "F1" in data:
        module.attach(recorded_penalty(data, penalties))
    denoised, before, gradients = [], [], []
    module.listeners.append(lambda sampler, step, x0_hat: denoised.append(x0_hat))
    heun_step, gradient = prior.heun_step, module.gradient

    def spy_step(x: Tensor, step: object) -> tuple[Tensor, Tensor]:
        result = heun_step(x, step)
        before.append(result[0].detach())
        return result

    prior.heun_step = spy_step
    module.gradient = lambda *args: gradients.append(gradient(*args)) or gradients[-1]

    noise = ReplayedNoise(data["z_normals"])
    latents = prior.draw_noise(noise, operator.image_shape, torch.zeros(1))
    check(latents, data["latents"], "latents")
    with torch.enable_grad():
        x = module.sample(operator(torch.from_numpy(data["gt"])), operator, noise)

    saved = data["steps_saved"].tolist()
    after = [b - g for b, g in zip(before, gradients, strict=False)] + before[-1:]  # the last step is unguided
    check(torch.stack(denoised)[saved], data["xN_phys"], "xN_phys")
    check(prior.denormalize(torch.stack(before)[saved]), data["xnext_pre_phys"], "xnext_pre_phys")
    check(prior.denormalize(torch.stack(after)[saved]), data["xnext_post_phys"], "xnext_post_phys")
    check(x, data["pred_phys"], "pred_phys")
    if penalties:
        check(torch.stack(penalties), data["loss_history"][..., 3], "equivariance losses")
    error = torch.linalg.vector_norm(x - torch.from_numpy(data["gt"]), dim=(2, 3))
    check(error / np.linalg.norm(data["gt"], axis=(2, 3)), data["rel_error"], "rel_error")
