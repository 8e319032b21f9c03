"""The script of the tables of faces composes configurations that exist, and compares like with like."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import yaml

from tests import benchmark_scripts
from tests.benchmark_scripts import files
from tests.golden import ROOT

TASKS = ("super_resolution", "gaussian_deblur", "motion_deblur", "random_inpainting", "box_inpainting")
LATENT = ("psld", "resample", "latent_daps")
PIXEL = ("dps", "mcg", "ddrm", "diffpir", "mpgd", "mpgd_ae", "sitcom", "daps")

commands = partial(benchmark_scripts.commands, "table_faces64.sh")


def rows(form: str, sampler: str) -> list[str]:
    return [line for line in commands("row", form, sampler) if line.startswith("cli.py")]


@pytest.mark.parametrize("sampler", [*LATENT, *PIXEL, "measurement_baseline", "linear_mmse"])
def test_every_task_of_a_sampler_is_a_composition_of_files_that_exist(sampler: str) -> None:
    found = rows("base", sampler)
    assert len(found) == (4 if sampler == "ddrm" else 5)  # motion blur has no singular values in closed form
    assert all((ROOT / file).is_file() for row in found for file in files(row))


@pytest.mark.parametrize("sampler", ["dps", "diffpir", "mpgd", "mpgd_ae", "sitcom", "daps", "resample", "latent_daps"])
@pytest.mark.parametrize("task", ["hdr", "phase_retrieval"])
def test_nonlinear_tasks_are_rows_when_named(task: str, sampler: str) -> None:
    (row,) = [line for line in commands("row", "base", sampler, task) if line.startswith("cli.py")]
    assert f"configs/task/faces64/{task}.yaml" in files(row)
    assert all((ROOT / file).is_file() for file in files(row))


@pytest.mark.parametrize("sampler", PIXEL)
@pytest.mark.parametrize("task", ["super_resolution", "random_inpainting"])
def test_every_pixel_sampler_has_an_equi_form(task: str, sampler: str) -> None:
    (base,) = [row for row in rows("base", sampler) if f"/{task}.yaml" in row]
    (equi,) = [row for row in rows("equi", sampler) if f"/{task}.yaml" in row]
    assert files(equi)[:-1] == files(base)
    assert (ROOT / files(equi)[-1]).is_file()


@pytest.mark.parametrize("sampler", LATENT)
@pytest.mark.parametrize("form", ["equi", "equicon", "more"])
def test_latent_samplers_have_every_form_for_every_task(form: str, sampler: str) -> None:
    for row, base in zip(rows(form, sampler), rows("base", sampler), strict=True):
        assert all((ROOT / file).is_file() for file in files(row))
        if form == "more":
            assert files(row)[2:] == files(base)[2:]
        else:
            assert files(row)[:-1] == files(base)
            assert files(row)[-1].startswith("configs/equireg/faces64/")


@pytest.mark.parametrize("sampler", LATENT)
@pytest.mark.parametrize("task", TASKS)
def test_a_row_at_equal_cost_differs_in_its_steps_alone(task: str, sampler: str) -> None:
    read = [(ROOT / f"configs/sampler/faces64/{sampler}{infix}_{task}.yaml").read_text() for infix in ("", "_more")]
    base, more = (yaml.safe_load(text)["model"]["init_args"] for text in read)
    assert more.pop("num_steps") > base.pop("num_steps")
    assert more == base


def test_searches_see_validation_faces() -> None:
    for verb in (
        ("tune", "psld", "super_resolution", "model.omega", "1,2"),
        ("tune_lambda", "equi", "psld", TASKS[0], "1"),
    ):
        (search,) = commands(*verb)
        assert "configs/data/faces64_val.yaml" in search
    assert search.endswith("--over trainer.callbacks.weight=0,1")


def test_the_metrics_of_a_finished_row_are_kept(tmp_path: Path) -> None:
    """In a copy of the repository's script, since they are kept beside it."""
    for folder in ("benchmarks", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("results"))
    made = tmp_path / "runs/table_faces64/box_inpainting/equi/psld/metrics.csv"
    made.parent.mkdir(parents=True)
    made.write_text("index\n0\n")
    row = (tmp_path / "benchmarks/table_faces64.sh", "row", "equi", "psld", "box_inpainting")
    benchmark_scripts.commands(*row)
    kept = tmp_path / "benchmarks/results/faces64/box_inpainting/equi/psld/metrics.csv"
    assert kept.read_text() == "index\n0\n"
    made.write_text("index\n0\n1\n")
    benchmark_scripts.commands(*row)
    assert kept.read_text() == "index\n0\n1\n"
    made.write_text("index\n0\n")
    benchmark_scripts.commands(*row)
    assert kept.read_text() == "index\n0\n1\n", "a try on fewer faces does not replace the row"
