"""The networks of FunDPS and DiffusionPDE reproduce recorded outputs; their checkpoints are read and not run."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from equireg.checkpoints import read_edm_pickle
from equireg.checkpoints.convert_edm import prior_of
from equireg.commands.checkpoint import checkpoint_command
from equireg.priors import EDMPrior
from tests.golden import parametrize_golden

TOLERANCE = 1e-5
"""Absolute, of float32 outputs of size 1."""


def recorded_prior(data: dict[str, np.ndarray]) -> EDMPrior:
    state = {name.removeprefix("sd/"): torch.from_numpy(data[name]) for name in data if name.startswith("sd/")}
    return prior_of(state, json.loads(str(data["init_kwargs"])), {}, "helmholtz").eval()


@parametrize_golden("edm_uno_tiny*.npz", "edm_unet_tiny*.npz")
@torch.no_grad()
def test_golden_networks_reproduce_recorded_outputs(golden: Path) -> None:
    data = dict(np.load(golden))
    prior = recorded_prior(data)
    sides = [int(name.removeprefix("x_")) for name in data if name.startswith("x_")]
    assert sides
    for side in sides:
        x = torch.from_numpy(data[f"x_{side}"])
        f = prior.network(x.float(), torch.from_numpy(data["noise_labels_F"]))
        np.testing.assert_allclose(f, data[f"F_{side}"], rtol=0, atol=TOLERANCE, err_msg=f"F_{side}")
        d = prior.denoise(x, torch.from_numpy(data["sigma"]))
        assert d.dtype == torch.float64
        np.testing.assert_allclose(d, data[f"D_{side}"], rtol=0, atol=TOLERANCE, err_msg=f"D_{side}")


@parametrize_golden("edm_uno_tiny*.pkl", "edm_unet_tiny*.pkl")
def test_golden_checkpoints_are_read_exactly_and_not_run(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Running the file's code would leave a file TRIPWIRE_... and end the process."""
    monkeypatch.chdir(tmp_path)
    data = dict(np.load(golden.with_suffix(".npz")))
    checkpoint = read_edm_pickle(golden)
    recorded = {name.removeprefix("sd/"): data[name] for name in data if name.startswith("sd/")}
    assert checkpoint.state.keys() == recorded.keys()
    for name, value in recorded.items():
        np.testing.assert_array_equal(checkpoint.state[name], value, err_msg=name)
    assert checkpoint.init_kwargs == json.loads(str(data["init_kwargs"]))
    assert not list(tmp_path.iterdir())


@parametrize_golden("edm_uno_tiny*.pkl", "edm_unet_tiny*.pkl")
@torch.no_grad()
def test_golden_converted_checkpoints_reproduce_recorded_outputs(golden: Path, tmp_path: Path) -> None:
    data = dict(np.load(golden.with_suffix(".npz")))
    output = tmp_path / "prior.safetensors"
    assert checkpoint_command(["convert", str(golden), str(output), "--pde", "navier_stokes"]) == 0
    prior = EDMPrior(str(output)).eval()
    assert prior.pde == "navier_stokes"
    d = prior.denoise(torch.from_numpy(data["x_16"]), torch.from_numpy(data["sigma"]))
    np.testing.assert_allclose(d, data["D_16"], rtol=0, atol=TOLERANCE)
