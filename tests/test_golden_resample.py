"""ReSample, Equi-ReSample and EquiCon-ReSample reproduce the recorded runs of the official code, step by step."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from equireg.priors import LatentPrior, Step, VPPrior
from lightning_modules import ReSample
from tests.golden import golden_files, parametrize_golden
from tests.golden_latent import RecordedAutoencoder, RecordedOperator, ReplayedNoise, make_penalty, make_prior

pytestmark = pytest.mark.filterwarnings("ignore:tolerance=")  # the published one is below the noise

CHAINS = [file.name for file in golden_files("resample*.npz") if not file.stem.startswith("resample_stop")]

TOLERANCE = 1e-5
"""Float32 of two implementations of the same arithmetic."""


class Silent(nn.Module):
    """Stands for the network where none is asked."""

    in_channels, out_channels, image_size, side_divisor = 3, 3, (8, 8), 1


def make_sampler(data: dict[str, np.ndarray], **options: float) -> ReSample:
    module = ReSample(
        make_prior(data),
        RecordedOperator(data, float(data["sigma_y"])),
        num_steps=int(data["num_steps_requested"]),
        eta=float(data["eta"]),
        pixel_iterations=int(data["pixel_max_iters"]),
        latent_iterations=int(data["latent_max_iters"]),
        **options,
    )
    if "form" in data:
        module.attach(make_penalty(data))
    return module


def spy(module: ReSample, method: str) -> list[tuple]:
    """What goes in and comes out of a method, call by call."""
    calls = []
    original = getattr(module, method)
    setattr(module, method, lambda *args, **named: calls.append((args, original(*args, **named))) or calls[-1][1])
    return calls


def check(ours: list[torch.Tensor], recorded: np.ndarray, name: str, relative: float = 0.0) -> None:
    assert len(ours) == len(recorded), name
    values = torch.stack(ours).detach().numpy().reshape(recorded.shape)
    np.testing.assert_allclose(values, recorded, relative, TOLERANCE, err_msg=name)


@parametrize_golden(*CHAINS, "equi_resample*.npz", "equicon_resample*.npz")
def test_golden_resample_reproduces_every_step(golden: Path) -> None:
    data = dict(np.load(golden))
    module = make_sampler(data)
    guided, resampled, penalties = (spy(module, name) for name in ("guided_step", "resample", "penalty_at"))
    pixel, latent, optimized = (spy(module, name) for name in ("pixel_stage", "latent_stage", "optimize"))
    noise = ReplayedNoise([data["z_T"], *data["noise_resample"]])
    with torch.enable_grad():
        x = module.sample(torch.from_numpy(data["y"]), module.operator, noise)

    assert not noise.draws
    assert [args[2].j for args, _ in resampled] == data["event_index"].tolist()
    check([z for _, z in resampled], data["event_z_out"], "event_z_out")
    steps = [args[2] for args, _ in resampled]
    check([torch.tensor(step.alpha_bar_prev) for step in steps], data["event_a_prev"], "event_a_prev")
    check([torch.tensor(module.resample_variance(step)) for step in steps], data["event_sigma"], "event_sigma")
    (entering, *_), leaving = latent[-1]
    check([args[0] for args, _ in guided[1:]] + [entering], data["z_traj"], "z_traj")
    check([entering], data["z_before_final"], "z_before_final")
    check([args[0] for args, _ in latent], data["latent_in"], "latent_in")
    check([z for _, z in latent], data["latent_out"], "latent_out")
    check([leaving], data["z_final"], "z_final")
    assert len(pixel) == len(data["pixel_event_index"])
    if pixel:
        (x_in, *_), x_out = optimized[0]
        check([x_in], data["pixel_in"], "pixel_in")
        check([x_out], data["pixel_out"], "pixel_out", relative=1e-5)  # AdamW divides small gradients by themselves
    x_hat = module.prior.decode(leaving)
    check([x_hat], data["x_hat"], "x_hat")
    np.testing.assert_array_equal(x.numpy(), x_hat.clamp(-1, 1).numpy())
    if "penalty_iter" in data:
        assert [args[1].k for args, _ in penalties] == data["penalty_iter"].tolist()
        check([value for _, value in penalties], data["penalty_weighted"], "penalty_weighted")


@parametrize_golden("resample_stop*.npz")
@pytest.mark.parametrize("case", ["max", "eps", "window", "pixel"])
def test_golden_resample_stops_where_the_official_code_stops(golden: Path, case: str) -> None:
    data = dict(np.load(golden))
    if f"{case}_y" not in data:
        pytest.skip(f"{golden.name} holds no case {case!r}")
    rate = {} if case == "pixel" else {"latent_lr": float(data[f"{case}_lr"])}
    prior = LatentPrior(VPPrior.from_network(Silent()), RecordedAutoencoder(data))
    module = ReSample(prior, RecordedOperator(data, 0.0), num_steps=10, **rate)
    losses = []
    guidance = module.guidance
    module.guidance = lambda loss, *args: losses.append(loss.item()) or guidance(loss, *args)
    y = torch.from_numpy(data[f"{case}_y"])
    step = Step(k=0, num_steps=10, alpha_bar=0.5, beta=0.0)
    if case == "pixel":
        optimized = spy(module, "optimize")
        prior.decode = prior.encode = lambda x: x  # the recorded start is an image
        module.pixel_stage(torch.from_numpy(data["pixel_x_init"]), y, module.operator, y)
        end, recorded = optimized[0][1], data["pixel_x"]
    else:
        z = torch.from_numpy(data["z_init"])
        end, recorded = module.latent_stage(z, y, module.operator, step, z), data[f"{case}_z"]
    assert len(losses) == int(data[f"{case}_iters"])
    compared = 20 if case == "window" else len(losses)  # far beyond any sensible learning rate the runs part
    np.testing.assert_allclose(losses[:compared], data[f"{case}_losses"][:compared], rtol=1e-5)
    if case != "window":
        np.testing.assert_allclose(end.numpy(), recorded, atol=TOLERANCE)
