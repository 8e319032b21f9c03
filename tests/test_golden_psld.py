"""PSLD, Equi-PSLD and EquiCon-PSLD reproduce the recorded runs of the official code, step by step."""

from pathlib import Path

import numpy as np
import torch

from equireg.priors import LatentPrior
from lightning_modules import PSLD
from tests.golden import parametrize_golden
from tests.golden_latent import RecordedOperator, ReplayedNoise, make_penalty, make_prior

TOLERANCE = 1e-5
"""Float32 of two implementations of the same arithmetic."""


def make_sampler(data: dict[str, np.ndarray], prior: LatentPrior) -> PSLD:
    module = PSLD(
        prior,
        RecordedOperator(data, float(data["sigma_y"])),
        num_steps=int(data["num_steps_requested"]),
        omega=float(data["omega"]),
        gamma=float(data["gamma"]),
        eta=float(data["eta"]),
        renoise_prediction="noise_meas" in data,
    )
    if "form" in data:
        module.attach(make_penalty(data))
    return module


def recorded_draws(data: dict[str, np.ndarray]) -> list[np.ndarray]:
    """z_T, then per step the draws of the chain, of the measurement, of the encoder, as far as there are any."""
    names = [name for name in ("noise_ddim", "noise_meas", "noise_enc") if name in data]
    return [data["z_T"], *(data[name][i] for i in range(int(data["N"])) for name in names)]


@parametrize_golden("psld*.npz", "equi_psld*.npz", "equicon_psld*.npz")
def test_golden_psld_reproduces_every_step(golden: Path) -> None:
    data = dict(np.load(golden))
    prior = make_prior(data)
    module = make_sampler(data, prior)
    states, estimates, images, misfits, glues, penalties = [], [], [], [], [], []
    prior.register_forward_pre_hook(lambda prior, inputs: states.append(inputs[0].detach()))
    module.listeners.append(lambda sampler, step, z0_hat: estimates.append(z0_hat))
    prior.decoder.register_forward_hook(lambda decoder, inputs, image: images.append((inputs[0], image)))
    penalty_at, guidance = module.penalty_at, module.guidance

    def guide(loss, z_t, iteration, aside):
        misfits.append((loss - penalties[-1]) / module.omega)
        glues.append(aside / module.gamma)
        return guidance(loss, z_t, iteration, aside=aside)

    module.guidance = guide
    module.penalty_at = lambda *args, **known: penalties.append(penalty_at(*args, **known)) or penalties[-1]

    noise = ReplayedNoise(recorded_draws(data))
    with torch.enable_grad():
        x = module.sample(torch.from_numpy(data["y"]), module.operator, noise)

    assert not noise.draws
    z_final, x_hat = images[-1]
    kept = data.get("traj_steps", np.arange(int(data["N"])))
    tolerance = 10 * TOLERANCE if int(data["N"]) == 1000 else TOLERANCE  # rounding grows over a thousand steps
    trajectory = torch.stack([*states[1:], z_final])[kept]
    np.testing.assert_allclose(trajectory.numpy(), data["z_traj"], atol=tolerance)
    estimates = torch.stack(estimates)[kept].numpy()
    np.testing.assert_allclose(estimates, data["z0_traj"], atol=2 * tolerance)  # values of about 30 at the first steps
    np.testing.assert_allclose(z_final.numpy(), data["z_final"], atol=tolerance)
    np.testing.assert_allclose(x_hat.numpy(), data["x_hat"], atol=tolerance / prior.scale_factor)  # D sees z / s
    np.testing.assert_array_equal(x.numpy(), x_hat.clamp(-1, 1).numpy())
    for name, ours in (("meas_norm", misfits), ("glue_norm", glues), ("penalty_weighted", penalties)):
        if name in data:
            values = torch.cat(ours).detach().numpy()
            np.testing.assert_allclose(values, data[name], rtol=1e-5, atol=tolerance, err_msg=name)
