"""Data modules of fields: generated on first use, in physical units, measured by sensors or given by the user."""

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from callbacks import PredictionWriter
from datamodules import Faces, Helmholtz, NavierStokes
from equireg.operators import RandomInpainting, Sensors
from equireg.pde.equations import get_equation
from equireg.pde.files import field_path, read_pairs
from equireg.pde.generate import HelmholtzLaw, NavierStokesLaw, generate
from equireg.priors import VPPrior
from equireg.runs import read_run
from lightning_modules import DPS, FieldLinearMMSE
from tests.conftest import TINY_UNET
from tests.tiny_run import TinySampler, predict


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Pairs of 8x8 of both equations: 40 to train, 3 to validate, 6 to test."""
    folder = tmp_path_factory.mktemp("pde")
    for law in (HelmholtzLaw(8), NavierStokesLaw(8, dt=0.01)):
        for split, count in (("train", 40), ("val", 3), ("test", 6)):
            generate(law, folder, split, count)
    return str(folder)


def ready(data, stage: str = "predict"):
    data.setup(stage)
    return data


@pytest.mark.parametrize("kind", [Helmholtz, NavierStokes])
def test_fields_are_served_in_physical_units(kind, folder: str) -> None:
    data = ready(kind(folder, size=8, batch_size=4))
    batch = next(iter(data.predict_dataloader()))
    x = read_pairs(field_path(folder, kind.pde, "test", 8))
    assert batch["x"].dtype == torch.float32
    np.testing.assert_array_equal(batch["x"], x[:4])
    assert batch["index"].tolist() == [0, 1, 2, 3]
    assert batch["name"][1] == "test00001"
    assert data.image_shape == (2, 8, 8)
    assert data.normalizer.settings()["std"] == pytest.approx(get_equation(kind.pde).std)


def test_pairs_to_train_on_are_shuffled_and_complete(folder: str) -> None:
    data = ready(Helmholtz(folder, size=8, batch_size=10), "fit")
    indices = [i for batch in data.train_dataloader() for i in batch["index"].tolist()]
    assert sorted(indices) == list(range(40))
    assert indices != sorted(indices)
    assert [len(batch["index"]) for batch in data.val_dataloader()] == [3]


def test_a_split_that_is_not_there_is_generated_on_first_use(tmp_path: Path) -> None:
    options = {"size": 8, "generate_train": 0, "generate_test": 5, "generate_seed": 3}
    data = ready(Helmholtz(str(tmp_path), **options))
    assert [path.name for path in tmp_path.iterdir()] == ["helmholtz_test_8.h5"]
    torch.testing.assert_close(data.dataset("test")[4]["x"], HelmholtzLaw(8).sample([4], 3, "test")[0])
    with pytest.raises(FileNotFoundError, match=r"cli.py generate helmholtz --folder .* --size 8 --train N makes it"):
        data.dataset("train")


def test_fields_that_do_not_fit_into_memory_are_read_one_by_one(folder: str) -> None:
    large = ready(Helmholtz(folder, size=8, cache_bytes=0)).dataset("test")
    small = ready(Helmholtz(folder, size=8)).dataset("test")
    assert large.x is None
    assert torch.equal(large[5]["x"], small[5]["x"])


def test_a_seed_picks_the_fields_that_are_restored(folder: str) -> None:
    def chosen(seed: int | None) -> list[int]:
        keys = ready(Helmholtz(folder, size=8, limit=3, subset_seed=seed, draws=2)).samples().keys()
        return [index for index, draw in keys if draw == 0]

    assert chosen(None) == [0, 1, 2]
    assert chosen(0) == chosen(0)
    assert len({tuple(chosen(seed)) for seed in range(8)}) > 3
    with pytest.raises(ValueError, match=r"subset_seed=1 .* limit is missing"):
        Helmholtz(folder, size=8, subset_seed=1)


def test_a_field_that_is_not_finite_is_reported_and_left_out(tmp_path: Path) -> None:
    path = generate(HelmholtzLaw(8), tmp_path, "test", 4)
    with h5py.File(path, "r+") as file:
        file["u"][2, 3, 3] = np.nan
    with pytest.warns(UserWarning, match="1 of 4 fields are not finite"):
        data = ready(Helmholtz(str(tmp_path), size=8))
    assert data.unreadable == {"test00002": "the field is not finite"}
    assert data.samples().keys() == [(0, 0), (1, 0), (3, 0)]


def test_files_that_do_not_fit_are_refused(tmp_path: Path, folder: str) -> None:
    source = Path(folder) / "ns_test_8.h5"
    (tmp_path / "helmholtz_test_8.h5").write_bytes(source.read_bytes())
    with pytest.raises(ValueError, match=r"holds fields of navier_stokes, not helmholtz"):
        ready(Helmholtz(str(tmp_path), size=8))
    (tmp_path / "helmholtz_test_8.h5").write_bytes(source.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"is truncated or not an HDF5 file"):
        ready(Helmholtz(str(tmp_path), size=8))
    other = HelmholtzLaw(8, wavenumber=2.0)
    generate(other, tmp_path, "train", 2)
    generate(HelmholtzLaw(8), tmp_path, "val", 2)
    with pytest.raises(ValueError, match="are normalised by different statistics"):
        ready(Helmholtz(str(tmp_path), size=8), "fit")
    with pytest.raises(ValueError, match=r"size=9 must be even"):
        NavierStokes(str(tmp_path), size=9)


@pytest.mark.parametrize("kind", [Helmholtz, NavierStokes])
def test_the_linear_estimate_restores_a_run_of_fields(kind, folder: str, tmp_path: Path) -> None:
    data = kind(folder, size=8, batch_size=4)
    predict(tmp_path / "run", PredictionWriter(), sampler=FieldLinearMMSE(Sensors("inverse", count=30)), data=data)
    run = read_run(tmp_path / "run")
    errors = [row.metrics["relative_l2"] for row in run.rows]
    assert len(errors) == 6
    assert np.mean(errors) < 1
    x0 = np.load(next((tmp_path / "run/predictions").glob("00002_*.npy")))
    measured = np.load(next((tmp_path / "run/measurements").glob("00002_*.npz")))
    if kind is Helmholtz:  # its covariance is exact, and takes the sensors at their word
        np.testing.assert_allclose(x0.flatten()[measured["positions"]], measured["y"], rtol=1e-4, atol=1e-6)
    assert np.array_equal(data.dataset("test")[2]["x"].numpy().flatten()[measured["positions"]], measured["y"])


def test_the_solver_completes_a_forward_estimate(folder: str, tmp_path: Path) -> None:
    def estimate(completion: str) -> tuple[torch.Tensor, torch.Tensor]:
        sampler = FieldLinearMMSE(Sensors("forward", count=30), completion)
        data = Helmholtz(folder, size=8, batch_size=6)
        predict(tmp_path / completion, sampler=sampler, data=data)
        batch = next(iter(data.predict_dataloader()))
        operator, y = sampler.measurement(batch, batch["index"].tolist())
        return sampler(y, batch["index"].tolist(), operator), batch["x"]

    (linear, x), (solved, _) = estimate("linear"), estimate("solver")
    torch.testing.assert_close(linear, solved, rtol=1e-4, atol=1e-6)  # the equation is linear
    assert (linear[:, 1] - x[:, 1]).norm() < 0.5 * x[:, 1].norm()


def test_estimates_that_make_no_sense_are_refused(folder: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the inverse task asks for a"):
        FieldLinearMMSE(Sensors("inverse"), "solver")
    with pytest.raises(ValueError, match=r"completion='fno' and only that needs an fno"):
        FieldLinearMMSE(Sensors("inverse"), "fno")
    sampler = FieldLinearMMSE(Sensors(count=9), statistics="exact")
    with pytest.raises(ValueError, match=r"statistics='exact': the covariance is known for helmholtz only"):
        predict(tmp_path / "run", sampler=sampler, data=NavierStokes(folder, size=8))


def test_fields_are_for_sensors_and_sensors_for_fields(folder: str, faces_file: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"fields are measured by Sensors, not by RandomInpainting"):
        predict(tmp_path / "a", sampler=TinySampler(RandomInpainting()), data=Helmholtz(folder, size=8))
    with pytest.raises(ValueError, match=r"fields of two channels \(a, u\), not images of 1"):
        predict(tmp_path / "b", sampler=TinySampler(Sensors(count=3)), data=Faces(faces_file))
    with pytest.raises(ValueError, match=r"there must be between 1 and 64"):
        predict(tmp_path / "c", sampler=TinySampler(Sensors(count=65)), data=Helmholtz(folder, size=8))


def write_csv(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def given(measurements: str, tmp_path: Path, sampler=None, **options) -> Helmholtz:
    data = Helmholtz(size=8, mode="given", measurements=measurements, **options)
    sampler = sampler or FieldLinearMMSE(Sensors("inverse", count=500))
    predict(tmp_path / "run", sampler=sampler, data=data)
    return data


def test_the_users_sensors_are_restored_without_truth(tmp_path: Path) -> None:
    x = HelmholtzLaw(8).sample([7], 0, "test")[0]
    lines = [f"{row},{column},{x[1, row, column].item()!r}" for row, column in ((1, 2), (5, 5), (3, 6))]
    path = write_csv(tmp_path / "mine.csv", "row, column, value", *lines)
    sampler = FieldLinearMMSE(Sensors("inverse", count=500))  # what it would draw does not matter
    data = given(path, tmp_path, sampler)
    batch = next(iter(data.predict_dataloader()))
    assert batch["name"] == ["mine"]
    assert "x" not in batch
    assert batch["parameters"]["positions"].tolist() == [[64 + 10, 64 + 45, 64 + 30]]
    operator, y = sampler.measurement(batch, [0])
    x0 = sampler(y, [0], operator)
    torch.testing.assert_close(x0[0, 1, 5, 5], x[1, 5, 5])


def test_statistics_of_the_training_split_serve_given_measurements(folder: str, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "mine.csv", "row,column,value", "1,2,0.5", "5,5,-0.25")
    data = NavierStokes(folder, size=8, mode="given", measurements=path)
    sampler = FieldLinearMMSE(Sensors("inverse"))
    predict(tmp_path / "run", PredictionWriter(), sampler=sampler, data=data)
    x0 = np.load(tmp_path / "run/predictions/00000_mine.npy")
    assert x0[1, 1, 2] == pytest.approx(0.5, rel=1e-2)
    assert np.abs(x0[0]).max() > 0


def test_measurements_of_a_run_are_given_back(tmp_path: Path) -> None:
    folder = tmp_path / "measurements"
    folder.mkdir()
    x = HelmholtzLaw(8).sample(range(2), 0, "test")
    operator = Sensors("forward", count=4).realize((2, 8, 8), [0, 1])
    for i in range(2):
        np.savez(folder / f"{i:05d}_x.npz", y=operator(x)[i].numpy(), positions=operator.positions[i].numpy())
    data = given(str(folder), tmp_path, FieldLinearMMSE(Sensors("forward")), batch_size=2)
    batch = next(iter(data.predict_dataloader()))
    torch.testing.assert_close(batch["y"], operator(x))
    assert torch.equal(batch["parameters"]["positions"], operator.positions)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["row,column,value", "8,0,1.0"], r"line 2: row 8, column 0 lies outside the grid of 8x8"),
        (["row,column,value", "1,1,1.0", "1,1,2.0"], r"positions repeat row 1, column 1 of channel 1"),
        (["row,column,value"], r"positions are empty"),
        (["row,column", "1,1"], r"must name the columns row, column, value; 'value' is missing"),
        (["row,column,value", "1,1"], r"line 2 does not have the 3 values of the header"),
        (["row,column,value", "1,1,nan"], r"holds values that are not finite"),
        (["row,column,value,channel", "1,1,1.0,a"], r"task='inverse' has no sensors on channel 0"),
        (["row,column,value,channel", "1,1,1.0,w"], r"channel='w' must be a or u"),
        (["row,column,value", "1,1,wet"], r"could not convert string to float: 'wet'"),
    ],
)
def test_bad_measurements_are_refused_before_the_run(lines: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        given(write_csv(tmp_path / "bad.csv", *lines), tmp_path)


def test_different_numbers_of_sensors_need_single_batches(tmp_path: Path) -> None:
    folder = tmp_path / "measurements"
    folder.mkdir()
    write_csv(folder / "a.csv", "row,column,value", "1,1,1.0")
    write_csv(folder / "b.csv", "row,column,value", "1,1,1.0", "2,2,1.0")
    with pytest.raises(ValueError, match=r"between 1 and 2 sensors: different numbers need batch_size=1, not 2"):
        given(str(folder), tmp_path, batch_size=2)
    given(str(folder), tmp_path)


def test_given_measurements_are_for_predict_alone(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "mine.csv", "row,column,value", "1,1,1.0")
    with pytest.raises(ValueError, match=r"mode='given' has no fields, which fit needs"):
        Helmholtz(size=8, mode="given", measurements=path).setup("fit")
    with pytest.raises(ValueError, match=r"mode='given' reads measurements"):
        Helmholtz(size=8, mode="given")
    with pytest.raises(FileNotFoundError, match=r"must be an existing file or folder"):
        given(str(tmp_path / "missing"), tmp_path)


def test_an_image_sampler_refuses_fields(folder: str, tmp_path: Path) -> None:
    sampler = DPS(VPPrior("random", network=TINY_UNET, space_to_depth=2), Sensors(count=3), num_steps=2)
    with pytest.raises(ValueError, match=r"images have 2 channels, the prior was trained on 1"):
        predict(tmp_path / "run", sampler=sampler, data=Helmholtz(folder, size=8))
