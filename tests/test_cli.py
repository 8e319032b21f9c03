"""The command line: configurations compose, runs leave what they promise, mistakes are one sentence."""

import inspect
import json
from pathlib import Path

import h5py
import pytest
import torch
import yaml
from PIL import Image

import cli
import lightning_modules
from equireg.autoencoder import Autoencoder
from equireg.priors import VPPrior
from equireg.runs import read_run
from tests.golden import ROOT

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
TASKS = ("super_resolution", "gaussian_deblur", "motion_deblur", "random_inpainting", "box_inpainting")


@pytest.fixture(scope="module")
def workspace(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_prior: VPPrior,
    tiny_autoencoder: Autoencoder,
    faces_file: str,
) -> Path:
    """A folder with tiny weights and small configuration files, one concern each."""
    folder = tmp_path_factory.mktemp("workspace")
    tiny_prior.save(folder / "prior.safetensors")
    tiny_autoencoder.save(folder / "autoencoder.safetensors")
    files = {
        "data": {"data": {"class_path": "datamodules.Faces", "init_args": {"path": faces_file, "batch_size": 2}}},
        "dps": {"model": {"class_path": "lightning_modules.DPS", "init_args": {"num_steps": 3, "zeta": 0.5}}},
        "prior": {"model": {"init_args": {"prior": with_weights("equireg.priors.VPPrior", folder / "prior")}}},
        "sr": {"model": {"init_args": {"operator": {"class_path": "equireg.operators.SuperResolution"}}}},
    }
    autoencoder = with_weights("equireg.autoencoder.Autoencoder", folder / "autoencoder")
    function = {"class_path": "equireg.mpe.Encoder", "init_args": {"autoencoder": autoencoder}}
    equireg = {"class_path": "callbacks.EquiReg", "init_args": {"function": function, "weight": 1.0}}
    files["equi"] = {"trainer": {"callbacks+": [equireg]}}
    for name, content in files.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return folder


def with_weights(class_path: str, stem: Path) -> dict:
    return {"class_path": class_path, "init_args": {"weights": f"{stem}.safetensors"}}


def arguments(
    workspace: Path, root: Path, *extra: str, files: tuple[str, ...] = ("data", "dps", "prior", "sr")
) -> list:
    chosen = [part for name in files for part in ("-c", str(workspace / f"{name}.yaml"))]
    return ["predict", *chosen, "--root", str(root), "--trainer.accelerator=cpu", "--trainer.devices=1", *extra]


def refused(capsys: pytest.CaptureFixture, *args: str) -> str:
    """The error message of a command that must fail with one sentence."""
    try:
        code = cli.main(list(args))
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert code not in (0, None)
    assert "Traceback" not in captured.err
    return captured.err


def sampler_of(path: Path) -> type[lightning_modules.PosteriorSampler]:
    """The class that a sampler's configuration names."""
    return getattr(lightning_modules, yaml.safe_load(path.read_text())["model"]["class_path"].split(".")[-1])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_every_configuration_file_is_parsed(path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Each file in its place in a composition that is complete without it; nothing is built."""
    monkeypatch.chdir(ROOT)
    kind = path.relative_to(ROOT / "configs").parts[0]
    if kind in ("train", "analysis"):
        composed, command = [path], {"train": "fit", "analysis": "test"}[kind]
    else:
        defaults = {
            "data": "data/faces64.yaml",
            "sampler": "sampler/faces64/dps_super_resolution.yaml",
            "prior": "prior/faces64.yaml",
            "task": "task/faces64/super_resolution.yaml",
            "equireg": "equireg/faces64/measure.yaml",
        }
        chosen = {name: path if name == kind else ROOT / "configs" / file for name, file in defaults.items()}
        if kind == "prior" and "LatentPrior" in path.read_text():
            chosen["sampler"] = ROOT / "configs/sampler/faces64/psld_super_resolution.yaml"
        if kind == "prior" and "EDMPrior" in path.read_text():
            chosen["sampler"] = ROOT / "configs/sampler/helmholtz64/fundps_inverse.yaml"
        sampler = sampler_of(chosen["sampler"])
        if "prior" not in inspect.signature(sampler).parameters:
            del chosen["prior"]  # the baselines take none
        elif sampler.space == "latent" and kind != "prior":
            chosen["prior"] = ROOT / "configs/prior/faces64_latent.yaml"
        elif sampler.space == "field" and kind != "prior":
            chosen["prior"] = ROOT / "configs/prior/helmholtz64.yaml"
        if sampler.space == "field" and kind != "task":
            chosen["task"] = ROOT / "configs/task/fields64/inverse.yaml"
        composed, command = list(chosen.values()), "predict"
    with pytest.raises(SystemExit) as stop:
        cli.main([command, *(part for file in composed for part in ("-c", str(file))), "--print_config"])
    assert stop.value.code in (0, None)
    assert yaml.safe_load(capsys.readouterr().out)


def test_help_is_a_page_a_person_can_read(capsys) -> None:
    assert cli.main(["--help"]) == 0
    page = capsys.readouterr().out
    assert len(page.splitlines()) < 40
    for command in cli.COMMANDS:
        assert command in page


def test_predict_leaves_what_the_readme_promises(workspace: Path, tmp_path: Path, capsys) -> None:
    assert cli.main(arguments(workspace, tmp_path, "--name=run", files=("data", "dps", "prior", "sr", "equi"))) == 0
    run = tmp_path / "run"
    assert "6 samples restored now" in capsys.readouterr().out
    for pattern, count in (("predictions/*.png", 6), ("predictions/*.npy", 6), ("rows/*.json", 6), ("events*", 1)):
        assert len(list(run.glob(pattern))) == count
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["init_args"]["zeta"] == 0.5
    assert config["trainer"]["callbacks"][0]["class_path"] == "callbacks.EquiReg"
    read = read_run(run)
    assert [row.index for row in read.rows] == list(range(6))
    wanted = {"psnr", "ssim", "data_misfit", "equivariance_error", "equivariance_error_before", "network_evaluations"}
    assert wanted <= set(read.rows[0].metrics)
    assert read.rows[0].metrics["network_evaluations"] == 3
    assert json.loads((run / "summary.json").read_text())["metrics"]["psnr"]["n"] == 6


def test_the_saved_configuration_repeats_the_run(workspace: Path, tmp_path: Path) -> None:
    cli.main(arguments(workspace, tmp_path, "--name=first"))
    again = ["predict", "-c", str(tmp_path / "first/config.yaml"), "--root", str(tmp_path), "--name=second"]
    assert cli.main(again) == 0
    first, second = (read_run(tmp_path / name).rows for name in ("first", "second"))
    assert [r.metrics["psnr"] for r in first] == [r.metrics["psnr"] for r in second]


def test_a_run_is_named_after_its_files(workspace: Path, tmp_path: Path) -> None:
    cli.main(arguments(workspace, tmp_path, "--data.limit=1"))
    assert (tmp_path / "data-dps-prior-sr" / "metrics.csv").is_file()


def test_the_same_command_again_computes_nothing(workspace: Path, tmp_path: Path, capsys) -> None:
    command = arguments(workspace, tmp_path, "--name=run")
    cli.main(command)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "run/predictions").iterdir()}
    assert cli.main([*command, "--data.batch_size=3"]) == 0  # the batch size is not part of the experiment
    assert "0 samples restored now, 6 found finished" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "run/predictions").iterdir()} == before


def test_a_folder_with_another_configuration_is_refused(workspace: Path, tmp_path: Path, capsys) -> None:
    cli.main(arguments(workspace, tmp_path, "--name=run"))
    message = refused(capsys, *arguments(workspace, tmp_path, "--name=run", "--model.zeta=0.7"))
    assert "holds another configuration (model.init_args.zeta: 0.5 there, 0.7 asked)" in message


def test_runs_are_compared_and_swept(workspace: Path, tmp_path: Path, capsys) -> None:
    base = arguments(workspace, tmp_path)[1:]
    code = cli.main(["sweep", "--name=search", *base, "--over", "model.init_args.zeta=0.2,1"])
    assert code == 0
    record = json.loads((tmp_path / "search/sweep.json").read_text())
    assert [setting["status"] for setting in record["settings"]] == ["finished", "finished"]
    folders = [setting["folder"] for setting in record["settings"]]
    assert cli.main(["compare", *folders, "--output", str(tmp_path / "table")]) == 0
    assert "psnr" in (tmp_path / "table.md").read_text()
    assert "psnr" in capsys.readouterr().out


def test_bf16_runs_the_network_in_bf16_and_the_sampler_in_float32(workspace: Path, tmp_path: Path) -> None:
    psnr = {}
    for precision in ("32-true", "bf16-mixed"):
        cli.main(arguments(workspace, tmp_path, f"--name={precision}", f"--trainer.precision={precision}"))
        psnr[precision] = torch.tensor([r.metrics["psnr"] for r in read_run(tmp_path / precision).rows])
    assert not torch.equal(*psnr.values())
    torch.testing.assert_close(*psnr.values(), rtol=0, atol=1.0)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--model.zeta=-1",), "zeta=-1.0 must be positive"),
        (("--model.operator.sigma_y=-0.1",), "sigma_y=-0.1 must not be negative"),
        (("--model.prior.weights=missing.safetensors",), "missing.safetensors' does not exist"),
        (("--model.prior.weights=random",), "needs the arguments of the network"),
        (("--data.path=missing.h5",), "missing.h5' does not exist"),
        (("--trainer.precision=16-true",), "precision='16-true' is not supported; available: 32-true, bf16-mixed"),
        (("--trainer.inference_mode=true",), "set trainer.inference_mode=false"),
        (("--model=lightning_modules.Typo",), "lightning_modules.Typo is unknown; available: "),
        (("--model.operator=equireg.operators.Typo",), "equireg.operators.Typo is unknown; available: "),
        (("--model.num_steps=none",), "respacing='none' must be a number of steps"),
        (("--no.such.option=1",), "no.such.option"),
    ],
)
def test_a_mistake_is_one_sentence(workspace: Path, tmp_path: Path, capsys, extra: tuple, message: str) -> None:
    error = refused(capsys, *arguments(workspace, tmp_path, "--name=run", *extra))
    assert message in error
    assert len(error[error.index("error: ") :].splitlines()) == 2  # the sentence, and where to look further
    assert not list(tmp_path.glob("run/predictions/*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": -1.0}, "weight=-1.0 must be a finite number, not negative"),
        ({"group": "rot45"}, "group='rot45' is unknown; available: d4"),
        ({"loss": "equicon"}, "maps into its own space"),
        ({"function": {"class_path": "equireg.mpe.PriorDecoder"}}, "takes latent inputs, DPS samples in pixel space"),
    ],
)
def test_a_bad_regulariser_is_refused(workspace: Path, tmp_path: Path, capsys, change: dict, message: str) -> None:
    content = yaml.safe_load((workspace / "equi.yaml").read_text())
    content["trainer"]["callbacks+"][0]["init_args"] |= change
    (tmp_path / "equi.yaml").write_text(yaml.safe_dump(content))
    error = refused(capsys, *arguments(workspace, tmp_path, "-c", str(tmp_path / "equi.yaml"), "--name=run"))
    assert message in error


def test_a_sampler_is_not_trained_and_a_training_not_sampled(workspace: Path, tmp_path: Path, capsys) -> None:
    fit = ["fit", *arguments(workspace, tmp_path)[1:]]
    assert "run it with `predict`, not `fit`" in refused(capsys, *fit)


def test_a_folder_of_colour_pictures_is_restored_in_grey_and_said_so(
    workspace: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(2):
        Image.new("RGB", (20, 30), (40 * i, 90, 160)).save(pictures / f"{i}.png")
    (pictures / "corrupt.png").write_bytes(b"not a picture")
    data = tmp_path / "pictures.yaml"
    data.write_text(
        yaml.safe_dump({"data": {"class_path": "datamodules.ImageFolder", "init_args": {"root": str(pictures)}}})
    )
    command = arguments(workspace, tmp_path, "--name=run", files=("dps", "prior", "sr"))
    with caplog.at_level("INFO"):
        assert cli.main([*command[:1], "-c", str(data), *command[1:]]) == 0
    assert sum("grey" in record.message for record in caplog.records) == 1
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert "corrupt" in json.dumps(summary)
    assert len(read_run(tmp_path / "run").rows) == 2


def test_given_measurements_are_restored_without_metrics(workspace: Path, tmp_path: Path) -> None:
    folder = tmp_path / "measured"
    folder.mkdir()
    Image.new("L", (4, 4), 120).save(folder / "mine.png")
    command = arguments(workspace, tmp_path, "--name=run", files=("dps", "prior", "sr"))
    data = {"class_path": "datamodules.ImageFolder", "init_args": {"root": str(folder), "mode": "given"}}
    (tmp_path / "given.yaml").write_text(yaml.safe_dump({"data": data}))
    assert cli.main([*command[:1], "-c", str(tmp_path / "given.yaml"), *command[1:]]) == 0
    row = read_run(tmp_path / "run").rows[0]
    assert "psnr" not in row.metrics
    assert "data_misfit" in row.metrics
    assert (tmp_path / "run/predictions/00000_mine.png").is_file()


def test_linear_mmse_beats_the_plain_picture_on_the_images_it_knows(workspace: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(300, 1, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(16, 16), mode="bicubic").clamp(-2, 2) / 2
    pixels = ((smooth + 1) * 127.5).round().to(torch.uint8).numpy()
    with h5py.File(tmp_path / "smooth.h5", "w") as file:
        file["train/images"], file["test/images"] = pixels[:280], pixels[280:]
    runs = {}
    for name in ("MeasurementBaseline", "LinearMMSE"):
        (tmp_path / "model.yaml").write_text(yaml.safe_dump({"model": {"class_path": f"lightning_modules.{name}"}}))
        command = arguments(workspace, tmp_path, f"--name={name}", files=("data",))
        operator = ("-c", str(workspace / "sr.yaml"), f"--data.path={tmp_path / 'smooth.h5'}")
        assert cli.main([*command, "-c", str(tmp_path / "model.yaml"), *operator]) == 0
        runs[name] = sum(r.metrics["psnr"] for r in read_run(tmp_path / name).rows) / 20
    assert runs["LinearMMSE"] > runs["MeasurementBaseline"] + 1
