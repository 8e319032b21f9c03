"""The operator learns, exports what the regulariser loads, and is refused where it was not trained."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from callbacks import EquiReg
from datamodules import Faces, Helmholtz, NavierStokes
from equireg.commands.export import export_command
from equireg.fno import FNO
from equireg.groups import get_group
from equireg.metrics import relative_l2
from equireg.mpe import NeuralOperator
from equireg.operators import Sensors
from equireg.pde.equations import Normalizer
from equireg.pde.generate import HelmholtzLaw, NavierStokesLaw, generate
from equireg.regularizer import equivariance_error
from lightning_modules import FieldLinearMMSE, FNOModule, MPEAnalysis
from tests.test_training import tags
from tests.tiny_run import predict

TINY = {"n_modes": [4, 4], "hidden_channels": 4, "n_layers": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Pairs of 8x8 of both equations: 32 to train, 4 to validate and to test."""
    folder = tmp_path_factory.mktemp("pde")
    for law in (HelmholtzLaw(8), NavierStokesLaw(8, dt=0.01)):
        for split, count in (("train", 32), ("val", 4), ("test", 4)):
            generate(law, folder, split, count)
    return str(folder)


def plain_trainer(folder: Path, **options) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=8,
        logger=TensorBoardLogger(folder, name="", version="", default_hp_metric=False),
        callbacks=[ModelCheckpoint(folder, save_last=True, every_n_train_steps=4)],
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **options,
    )


def tiny_fno(pde: str = "helmholtz", **options) -> FNO:
    torch.manual_seed(0)
    return FNO("random", pde, network=TINY, **options)


def test_an_operator_is_trained_logged_exported_and_loaded(folder: str, tmp_path: Path) -> None:
    path = tmp_path / "fno.safetensors"
    fno = tiny_fno()
    module = FNOModule(fno, lr=1e-2, warmup_steps=1, export=str(path))
    data = Helmholtz(folder, size=8, batch_size=8)
    plain_trainer(tmp_path).fit(module, datamodule=data)
    wanted = {
        "train/relative_l2",
        "val/relative_l2",
        "val/equivariance_error_sigma0",
        "val/equivariance_error_sigma0.1",
    }
    assert wanted <= set(tags(tmp_path, "scalars"))
    assert tags(tmp_path, "images") == ["truth_prediction_error"]
    loaded = FNO(str(path), pde="helmholtz")
    assert loaded.description == fno.description
    u = data.dataset("test")[0]["x"][None, 1:]
    assert relative_l2(loaded.map(u), fno.map(u)).item() < 5e-3  # half precision
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert not [name for name in checkpoint["state_dict"] if "_metadata" in name]
    FNOModule(tiny_fno()).load_state_dict(checkpoint["state_dict"], strict=True)
    assert export_command([str(tmp_path / "last.ckpt"), str(tmp_path / "again.safetensors")]) == 0
    again = FNO(str(tmp_path / "again.safetensors"))
    torch.testing.assert_close(again.map(u), loaded.map(u))


def test_training_goes_on_from_a_checkpoint_and_lowers_the_error(folder: str, tmp_path: Path) -> None:
    def train(steps: int, checkpoint: Path | None) -> float:
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=steps,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        module, data = FNOModule(tiny_fno(), lr=2e-2, warmup_steps=1), Helmholtz(folder, size=8, batch_size=8)
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        trainer.save_checkpoint(tmp_path / "own.ckpt")
        return trainer.callback_metrics["val/relative_l2"].item()

    first = train(4, None)
    assert train(40, tmp_path / "own.ckpt") < 0.8 * first


def test_the_error_of_a_test_is_physical_and_per_field(folder: str, tmp_path: Path) -> None:
    fno, data = tiny_fno("navier_stokes"), NavierStokes(folder, size=8, batch_size=3)
    module = FNOModule(fno, test_sigmas=(0.5,))
    metrics = plain_trainer(tmp_path).test(module, datamodule=data, verbose=False)[0]
    x = torch.stack([data.dataset("test")[i]["x"] for i in range(4)])
    assert metrics["test/relative_l2"] == pytest.approx(
        relative_l2(fno.map(x[:, 1:]), x[:, :1]).mean().item(), rel=1e-5
    )
    u, group = fno.normalizer.normalize(x)[:, 1:], get_group("navier_stokes_exact")
    error = equivariance_error(fno, group, u, torch.ones(4, dtype=torch.long)).mean().item()
    assert metrics["test/equivariance_error_sigma0"] == pytest.approx(error, rel=1e-5)
    assert metrics["test/equivariance_error_sigma0.5"] != pytest.approx(error, rel=1e-5)


def test_an_untrained_operator_takes_the_units_of_the_data(tmp_path: Path) -> None:
    for split in ("train", "val"):
        generate(HelmholtzLaw(8, wavenumber=3.0), tmp_path, split, 4)
    fno, data = tiny_fno(), Helmholtz(str(tmp_path), size=8)
    published = fno.normalizer.settings()["std"]
    plain_trainer(tmp_path, limit_train_batches=1, limit_val_batches=1).fit(FNOModule(fno), datamodule=data)
    assert fno.normalizer.settings() == data.normalizer.settings()
    assert fno.normalizer.settings()["std"] != published


def test_what_cannot_be_trained_is_refused(folder: str, faces_file: str, tmp_path: Path) -> None:
    helmholtz = Helmholtz(folder, size=8)

    def refused(message: str, fno: FNO, data, **options) -> None:
        with pytest.raises(ValueError, match=message):
            plain_trainer(tmp_path, **options).fit(FNOModule(fno), datamodule=data)

    refused("the FNO is one of navier_stokes, the fields are of helmholtz", tiny_fno("navier_stokes"), helmholtz)
    refused("the fields are of no equation", tiny_fno(), Faces(faces_file))
    refused("complex weights are trained in '32-true'", tiny_fno(), helmholtz, precision="bf16-mixed")
    large = FNO("random", "helmholtz", network=TINY | {"n_modes": [16, 16]})
    refused("needs a height of 16, got 8", large, helmholtz)


def test_weights_of_another_equation_or_architecture_are_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "fno.safetensors")
    tiny_fno().save(path)
    with pytest.raises(ValueError, match=r"were trained on helmholtz, not on navier_stokes"):
        FNO(path, pde="navier_stokes")
    with pytest.raises(ValueError, match=r"direction='forward' contradicts weights"):
        FNO(path, direction="forward")
    with pytest.raises(ValueError, match=r"weights='random' needs network"):
        FNO("random", pde="helmholtz")
    with pytest.raises(ValueError, match=r"weights='random' needs pde"):
        FNO("random", network=TINY)
    with pytest.raises(ValueError, match=r"network: .*colour"):
        FNO("random", "helmholtz", network=TINY | {"colour": 3})
    with pytest.raises(ValueError, match=r"pde='wave' is unknown; available: helmholtz, navier_stokes"):
        FNO("random", "wave", network=TINY)


class Prior(torch.nn.Module):
    """What the regulariser asks of a prior."""

    def __init__(self, pde: str | None, normalizer: Normalizer) -> None:
        super().__init__()
        self.pde, self.normalizer = pde, normalizer


def test_the_regularisers_function_maps_the_solution_in_the_priors_units(tmp_path: Path) -> None:
    fno = tiny_fno()
    fno.save(tmp_path / "fno.safetensors", half=False)
    f = NeuralOperator(str(tmp_path / "fno.safetensors"))
    x = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(f(x), fno(x[:, 1:]))
    assert f(x.double()).dtype == torch.float64
    assert not any(parameter.requires_grad for parameter in f.parameters())
    units = Normalizer([0.0, 0.001], [1.0, 0.01])
    f.bind(Prior("helmholtz", units))
    u = fno.normalizer.normalize(units.denormalize(x))[:, 1:]
    torch.testing.assert_close(f(x), fno(u))
    f.bind(Prior(None, fno.normalizer))
    torch.testing.assert_close(f(x), fno(x[:, 1:]))


def test_the_regularisers_function_is_refused_where_it_was_not_trained(
    tmp_path: Path, folder: str, faces_file: str
) -> None:
    tiny_fno().save(tmp_path / "fno.safetensors")
    f = NeuralOperator(str(tmp_path / "fno.safetensors"))
    with pytest.raises(ValueError, match=r"the FNO is one of helmholtz, the fields are of navier_stokes"):
        f.bind(Prior("navier_stokes", Normalizer.of("navier_stokes")))
    with pytest.raises(ValueError, match=r"two channels \(a, u\), not images of 1"):
        f.check_shape((1, 64, 64))
    with pytest.raises(ValueError, match=r"were trained on helmholtz, not on navier_stokes"):
        NeuralOperator(str(tmp_path / "fno.safetensors"), pde="navier_stokes")
    tiny_fno(direction="forward").save(tmp_path / "forward.safetensors")
    with pytest.raises(ValueError, match=r"map a to u; the regulariser needs an FNO from u to a"):
        NeuralOperator(str(tmp_path / "forward.safetensors"))
    sampler = FieldLinearMMSE(Sensors(count=9))
    with pytest.raises(ValueError, match=r"the FNO is one of helmholtz, the fields are of navier_stokes"):
        predict(tmp_path / "run", EquiReg(f, "flip", 0.0), sampler=sampler, data=NavierStokes(folder, size=8))


def test_a_run_records_the_equivariance_error_of_restored_fields(folder: str, tmp_path: Path) -> None:
    f = NeuralOperator.of(tiny_fno())
    sampler, data = FieldLinearMMSE(Sensors(count=9)), Helmholtz(folder, size=8, batch_size=4)
    records = []
    step = sampler.predict_step
    sampler.predict_step = lambda *args, **kw: records.append(step(*args, **kw)) or records[-1]
    predict(tmp_path / "run", EquiReg(f, "helmholtz_d4", 0.0), sampler=sampler, data=data)
    error = [row["equivariance_error"] for row in records[0]["records"]]
    u = data.normalizer.normalize(records[0]["x0"])
    group = get_group("helmholtz_d4")
    expected = [equivariance_error(f, group, u, torch.full((4,), number)) for number in range(1, 8)]
    assert error == pytest.approx(torch.stack(expected).mean(0).tolist(), rel=1e-4)


def test_the_operator_completes_a_linear_estimate(folder: str, tmp_path: Path) -> None:
    fno, operator = tiny_fno(), Sensors("inverse", count=30)
    sampler = FieldLinearMMSE(operator, "fno", fno)
    data = Helmholtz(folder, size=8, batch_size=4)
    predict(tmp_path / "run", sampler=sampler, data=data)
    batch = next(iter(data.predict_dataloader()))
    definite, y = sampler.measurement(batch, [0, 1, 2, 3])
    x0 = sampler(y, [0, 1, 2, 3], definite)
    torch.testing.assert_close(x0[:, :1], fno.map(x0[:, 1:]))
    with pytest.raises(ValueError, match=r"direction='inverse' does not fit task='forward'"):
        FieldLinearMMSE(Sensors("forward"), "fno", fno)


@pytest.mark.parametrize("pde", ["helmholtz", "navier_stokes"])
def test_the_analysis_measures_every_element_on_every_input(pde: str, folder: str, tmp_path: Path) -> None:
    fno = tiny_fno(pde)
    kind = {"helmholtz": Helmholtz, "navier_stokes": NavierStokes}[pde]
    groups = {"helmholtz": ["helmholtz_d4"], "navier_stokes": ["navier_stokes_exact_full", "flip"]}[pde]
    data, module = kind(folder, size=8, batch_size=3), MPEAnalysis(fno, groups, sigmas=(0.1, 1.0))
    plain_trainer(tmp_path).test(module, datamodule=data, verbose=False)
    with open(tmp_path / "mpe.csv") as file:
        rows = list(csv.DictReader(file))
    elements = sum(len(get_group(name).elements) - 1 for name in groups)
    assert len(rows) == (3 + 3) * elements
    assert {row["n"] for row in rows} == {"4"}
    assert (tmp_path / "mpe.png").read_bytes().startswith(b"\x89PNG")
    u = fno.normalizer.normalize(torch.stack([data.dataset("test")[i]["x"] for i in range(4)]))[:, 1:]
    errors = equivariance_error(fno, get_group(groups[0]), u, torch.full((4,), 2)).numpy()
    row = next(
        row for row in rows if row["input"] == "clean" and row["element"] == get_group(groups[0]).elements[2].name
    )
    assert float(row["relative_error"]) == pytest.approx(errors.mean(), rel=1e-4)
    assert float(row["standard_error"]) == pytest.approx(errors.std(ddof=1) / np.sqrt(4), rel=1e-3)


def test_the_analysis_refuses_grids_that_the_elements_cannot_act_on(tmp_path: Path) -> None:
    generate(NavierStokesLaw(12, dt=0.05), tmp_path, "test", 1)
    module = MPEAnalysis(tiny_fno("navier_stokes"), ["navier_stokes_exact"])
    with pytest.raises(ValueError, match=r"must be a multiple of 8, not 12x12"):
        plain_trainer(tmp_path).test(module, datamodule=NavierStokes(str(tmp_path), size=12), verbose=False)
