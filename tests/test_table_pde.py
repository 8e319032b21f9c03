"""The script of the table of fields composes configurations that exist, one per setting."""

import re
from functools import partial

import pytest
import yaml

from tests import benchmark_scripts
from tests.benchmark_scripts import files
from tests.golden import ROOT

PDES = ("helmholtz", "navier_stokes")
ROWS = {("forward", 100): 10, ("inverse", 100): 14, ("inverse_12percent", 100): 8, ("inverse", 500): 2}
SEARCHES = {
    "tune_weight": ("1,2.5",),
    "tune_diffusion_pde": ("10,30",),
    "tune_ridge": ("0.01",),
    "tune_lambda": ("flip", "0.1,0.3"),
}


commands = partial(benchmark_scripts.commands, "table_pde.sh")


@pytest.mark.parametrize("pde", PDES)
@pytest.mark.parametrize(("task", "steps"), ROWS, ids=str)
def test_every_row_is_a_composition_of_files_that_exist(pde: str, task: str, steps: int) -> None:
    rows = commands("rows", pde, task, steps, 160, 64)
    assert len(rows) == ROWS[task, steps]
    assert len({re.search(r"--name=(\S+)", row)[1] for row in rows}) == len(rows)
    for row in rows:
        assert all((ROOT / file).is_file() for file in files(row))
        assert files(row)[-1].startswith(f"configs/equireg/{pde}64/")  # each measures the equivariance error


def test_rows_differ_in_what_their_names_say() -> None:
    rows = {row.split("100_")[-1]: row for row in commands("rows", "helmholtz", "inverse", 100, 160, 64)}
    assert files(rows["equi_fundps_flip"])[1] == files(rows["fundps"])[1]
    assert files(rows["equi_fundps_flip"])[-1].endswith("fundps_inverse_flip.yaml")
    assert "--model.temperature=0" in rows["fundps_t0"]
    assert "--model.num_steps=160" in rows["fundps_more"]
    assert files(rows["fundps_placed"])[1].endswith("fundps_inverse_placed.yaml")
    assert files(rows["equi_fundps_placed"])[1].endswith("fundps_inverse_placed_exact.yaml")
    assert files(rows["equi_fundps_placed_t0"]) == files(rows["equi_fundps_placed"])
    assert "--model.temperature=0" in rows["equi_fundps_placed_t0"]
    assert files(rows["equi_fundps_placed"])[-1] == files(rows["equi_fundps_exact"])[-1]
    assert commands("rows", "helmholtz", "inverse", 100, 160, 64, ONLY="fundps") == [rows["fundps"]]


@pytest.mark.parametrize("pde", PDES)
@pytest.mark.parametrize("verb", SEARCHES)
def test_searches_see_validation_fields_and_files_that_exist(pde: str, verb: str) -> None:
    for task in ("forward", "inverse"):
        (search,) = commands(verb, pde, task, 100, *SEARCHES[verb])
        assert all((ROOT / file).is_file() for file in files(search))
        assert "--data.predict_split=val" in search
        assert "--metric relative_l2" in search


@pytest.mark.parametrize(
    ("arguments", "axis"),
    [
        (("tune_weight", "helmholtz", "inverse", 100, "1,2.5"), "model.weight=125,312.5"),
        (("tune_weight", "helmholtz", "inverse_12percent", 100, "1"), "model.weight=492"),
        (("tune_diffusion_pde", "helmholtz", "inverse", 100, "9"), "model.zeta_u=9"),
        (("tune_diffusion_pde", "helmholtz", "forward", 100, "9"), "model.zeta_a=9"),
    ],
    ids=str,
)
def test_weights_are_per_sensor_and_step_sizes_those_of_the_observed_field(arguments: tuple, axis: str) -> None:
    (search,) = commands(*arguments)
    assert f"--over {axis} " in search


def test_the_weight_of_a_penalty_is_a_share_of_the_chosen_weight() -> None:
    chosen = yaml.safe_load((ROOT / "configs/sampler/helmholtz64/fundps_forward.yaml").read_text())
    weight = chosen["model"]["init_args"]["weight"]
    (search,) = commands("tune_lambda", "helmholtz", "forward", 100, "exact", "0,0.1,0.5")
    assert f"--over trainer.callbacks.weight=0,{0.1 * weight:g},{0.5 * weight:g} " in search


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rows", "wave", "inverse", 100, 160, 64), "PDE must be helmholtz or navier_stokes, not 'wave'"),
        (("rows", "helmholtz", "sideways", 100, 160, 64), "TASK 'sideways' is unknown"),
    ],
    ids=str,
)
def test_what_it_does_not_know_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        commands(*arguments)
