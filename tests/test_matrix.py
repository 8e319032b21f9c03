"""The table of samplers and operators says what the code does."""

from pathlib import Path

import pytest

import cli
from equireg.commands.matrix import BEGIN, END, EXTENSION, NO, YES, capability_matrix, with_matrix
from equireg.operators import MotionDeblur, PhaseRetrieval
from tests.golden import ROOT


def rows() -> dict[str, dict[str, str]]:
    """Sampler -> column -> cell."""
    found = {}
    for table in capability_matrix(cli.samplers()).split("\n\n")[:2]:
        header, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
        found |= {line[0].replace("`", ""): dict(zip(header, line, strict=True)) for line in lines}
    return found


def test_the_readme_holds_the_table_that_the_code_makes() -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert with_matrix(page, capability_matrix(cli.samplers())) == page, "run: python cli.py matrix --write README.md"


PAPER = """DPS, DDRM, MCG, DiffPIR, MPGD, MPGDAE, SITCOM, PSLD, ReSample, DAPS, LatentDAPS, FunDPS, DiffusionPDE,
DiffStateGrad-DPS, DiffStateGrad-PSLD, DiffStateGrad-ReSample, DiffStateGrad-DAPS"""


@pytest.mark.parametrize("method", [name.strip() for name in PAPER.split(",")])
def test_the_table_lists_every_method_of_the_papers_tables(method: str) -> None:
    assert method in rows()


def test_every_cell_that_is_refused_is_refused_by_the_sampler_in_one_sentence() -> None:
    table = rows()
    assert table["DDRM"]["MotionDeblur"] == NO
    by_name = {kind.__name__: kind for kind in cli.samplers()}
    assert "has none" in by_name["DDRM"].supports(MotionDeblur())
    assert table["PSLD"]["PhaseRetrieval"] == NO
    assert "needs a linear operator" in by_name["PSLD"].supports(PhaseRetrieval())
    assert "needs a plain picture" in by_name["MeasurementBaseline"].supports(PhaseRetrieval())


def test_the_table_tells_extensions_and_what_attaches() -> None:
    table = rows()
    assert (table["DPS"]["PhaseRetrieval"], table["DiffPIR"]["PhaseRetrieval"]) == (YES, EXTENSION)
    assert (table["DPS"]["∂ prior"], table["DDRM"]["∂ prior"]) == (YES, NO)
    assert (table["DPS"]["Equi"], table["PSLD"]["EquiCon"], table["LinearMMSE"]["Equi"]) == (YES, YES, NO)


def test_the_table_goes_between_the_markers_and_nowhere_else(tmp_path: Path, capsys) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert cli.main(["matrix", "--write", str(page)]) == 0
    once = page.read_text()
    assert once.startswith(f"before\n{BEGIN}\n\n| sampler |")
    assert once.endswith(f"\n{END}\nafter\n")
    assert "old" not in once
    assert cli.main(["matrix", "--write", str(page)]) == 0
    assert page.read_text() == once
    page.write_text("no markers")
    assert cli.main(["matrix", "--write", str(page)]) == 1
    assert "the page must hold the line" in capsys.readouterr().err
    assert page.read_text() == "no markers"


def test_the_command_prints_the_table(capsys) -> None:
    assert cli.main(["matrix"]) == 0
    assert capsys.readouterr().out.strip() == capability_matrix(cli.samplers())
