"""The demonstration's fields: from the command to the table and the figure, with tiny untrained networks."""

import csv
import io
import shlex
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import cli
from equireg.fno import FNO
from equireg.pde.equations import EQUATIONS
from equireg.pde.files import read_attributes
from equireg.priors import EDMPrior
from equireg.runs import read_run
from tests.golden import ROOT
from tests.tiny_fields import TINY_FIELD_NETWORK

pytest.importorskip("matplotlib")
pytest.importorskip("skimage")

PDES = ("navier_stokes", "helmholtz")
SAMPLERS = ("FunDPS", "Equi-FunDPS")
DEMO = ["demo", "--only=fields", "--num_steps=2"]
FOLDER = Path("runs/demo/equations")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the configurations, and with tiny weights in the place of the bundled ones."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "configs").symlink_to(ROOT / "configs")
    torch.manual_seed(0)
    for pde in PDES:
        prior = EDMPrior("random", pde, "FieldUNet", TINY_FIELD_NETWORK | {"side": 64}, noise="white")
        torch.nn.init.normal_(prior.network.unet.conv_out.weight, std=0.1)
        prior.save(folder / f"equireg/assets/{pde}64_prior.safetensors")
        fno = FNO("random", pde, network={"n_modes": [4, 4], "hidden_channels": 4, "n_layers": 1})
        fno.save(folder / f"equireg/assets/fno_{pde}64.safetensors")
    return folder


@pytest.fixture(scope="module")
def told(workspace: Path) -> str:
    """What the demonstration prints."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as page:
        patch.chdir(workspace)
        assert cli.main(DEMO) == 0
    return page.getvalue()


@pytest.fixture
def there(workspace: Path, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the working directory, after the demonstration."""
    monkeypatch.chdir(workspace)


@pytest.mark.usefixtures("there")
def test_it_ends_with_a_table_of_both_equations_and_samplers(told: str) -> None:
    with open(FOLDER / "table.csv", newline="") as file:
        rows = {(row["block"], row["run"], row["metric"]): row for row in csv.DictReader(file)}
    metrics = ("relative_l2", "data_misfit", "equivariance_error")
    assert set(rows) == {(EQUATIONS[pde].title, s, m) for pde in PDES for s in SAMPLERS for m in metrics}
    assert {row["n"] for row in rows.values()} == {"2"}
    assert all(float(row["mean"]) > 0 for row in rows.values())
    for word in (*(EQUATIONS[pde].title for pde in PDES), *SAMPLERS, *metrics):
        assert word in told
    assert str(FOLDER / "demo.png") in told
    assert "tensorboard --logdir runs" in told


@pytest.mark.usefixtures("there")
def test_only_test_fields_are_generated_and_only_the_solution_is_measured() -> None:
    files = sorted((FOLDER / "data").glob("*.h5"))
    assert [file.name for file in files] == ["helmholtz_test_64.h5", "ns_test_64.h5"]
    assert [read_attributes(file).count for file in files] == [2, 2]
    for pde in PDES:
        positions = [
            np.load(file)["positions"]
            for sampler in SAMPLERS
            for file in sorted((FOLDER / pde / sampler.lower() / "measurements").iterdir())
        ]
        assert len(positions) == 2 * 2 * len(SAMPLERS)  # fields x draws
        assert all(len(own) == 125 and own.min() >= 64**2 for own in positions)


@pytest.mark.usefixtures("there")
def test_the_figure_names_and_scales_what_it_shows() -> None:
    from equireg.commands.demo_fields import draw

    with Image.open(FOLDER / "demo.png") as stored:
        assert stored.size[0] > 1000
        assert stored.size[1] > 400
    runs = {(EQUATIONS[pde].title, s): FOLDER / pde / s.lower() for pde in PDES for s in SAMPLERS}
    axes = np.array(draw(runs, FOLDER / "data").axes).reshape(2, 6)
    columns = ["truth", "sensors", *SAMPLERS, "|error| of FunDPS", "|error| of Equi-FunDPS"]
    assert [axis.get_title() for axis in axes[0]] == columns
    for row, pde in zip(axes, PDES, strict=True):
        assert EQUATIONS[pde].title in row[0].get_ylabel()
        sensors = row[1].collections[0]
        assert sensors.get_offsets().shape == (125, 2)
        fields = [row[i].images[0] for i in (0, 2, 3)]
        errors = [row[i].images[0] for i in (4, 5)]
        truth = fields[0].get_array()
        largest = np.abs(truth).max()
        assert truth.std() > 0
        assert {image.get_clim() for image in fields} == {(-largest, largest)}
        assert {image.get_clim() for image in errors} == {(0, max(image.get_array().max() for image in errors))}
        for sampler, axis, restored, error in zip(SAMPLERS, row[2:4], fields[1:], errors, strict=True):
            assert np.array_equal(error.get_array(), np.abs(restored.get_array() - truth))
            draws = [r.metrics["relative_l2"] for r in read_run(FOLDER / pde / sampler.lower()).rows if r.index == 0]
            assert len(draws) == 2
            assert f"{np.mean(draws):.3f}" in axis.get_xlabel()


def test_a_sensor_is_drawn_where_it_measured() -> None:
    from matplotlib.figure import Figure

    from equireg.commands.demo_fields import draw_sensors

    axis = Figure().subplots()
    draw_sensors(axis, np.array([64**2 + 3 * 64 + 5]), np.array([0.5]), "solution")
    assert axis.collections[0].get_offsets().tolist() == [[5, 3]]  # column to the right, row down
    assert axis.get_ylim()[0] > axis.get_ylim()[1]


@pytest.mark.usefixtures("there")
def test_a_second_run_restores_nothing(capsys) -> None:
    results = sorted(FOLDER.glob("*/*/rows/*.json")) + sorted((FOLDER / "data").glob("*.h5"))
    before = [file.stat().st_mtime_ns for file in results]
    assert cli.main(DEMO) == 0
    assert capsys.readouterr().out.count("0 samples restored now, 4 found finished") == 4
    assert [file.stat().st_mtime_ns for file in results] == before


@pytest.mark.usefixtures("there")
def test_the_command_it_ends_with_restores_from_the_sensors_of_a_file(told: str) -> None:
    command = shlex.split(told.partition("python cli.py ")[2].replace("\\\n", ""))
    assert cli.main([*command, "--model.num_steps=2", "--name=mine"]) == 0
    (file,) = Path("runs/mine/predictions").glob("*.npy")
    restored, demonstrated = (
        np.load(f) for f in (file, min((FOLDER / "navier_stokes/equi-fundps/predictions").glob("*.npy")))
    )
    # convolutions of another batch size differ in the last bits of float32
    assert np.linalg.norm(restored - demonstrated) < 1e-4 * np.linalg.norm(demonstrated)


def test_missing_weights_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(DEMO) == 1
    (told,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error"))
    assert "64.safetensors' does not exist" in told
    assert "subclass" not in told.lower()  # the parser's account of what else a callback could be


@pytest.mark.parametrize("pde", PDES)
def test_both_samplers_are_measured_by_the_same_function_and_group(pde: str) -> None:
    files = (ROOT / f"configs/equireg/{pde}64/{name}.yaml" for name in ("measure", "fundps_inverse"))
    plain, equi = (yaml.safe_load(file.read_text())["trainer"]["callbacks+"][0]["init_args"] for file in files)
    assert plain["weight"] == 0
    assert (plain["function"], plain["group"]) == (equi["function"], equi["group"])
