import csv
import io
import json
import math
import os
import threading
import warnings

import numpy as np
import pytest
from rich.console import Console

from equireg.bootstrap import interval_of_mean
from equireg.commands.compare import compare, compare_command
from equireg.runs import atomic_write, read_run


def write_run(folder, samples, summary=None):
    """A run's folder; samples: dicts with index, measurement and metrics, draw 0 and no name unless given."""
    folder.mkdir(parents=True)
    samples = [{"draw": 0, "name": "", **sample} for sample in samples]
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for sample in samples for key in sample)))
        writer.writeheader()
        writer.writerows(samples)
    (folder / "summary.json").write_text(json.dumps(summary or {"count": len(samples), "metrics": {}}))
    return str(folder)


def run_of(folder, psnr, task="sr4", **columns):
    """A run with one draw per sample, which saw the measurements of ``task``."""
    columns = {"psnr": psnr, **columns}
    return write_run(
        folder,
        [{"index": i, "measurement": f"{task}-{i}", **{k: v[i] for k, v in columns.items()}} for i in range(len(psnr))],
    )


def cell(comparison, run, metric="psnr"):
    return comparison.blocks[0].cells[run, metric]


def cells_of_csv(comparison):
    return list(csv.DictReader(io.StringIO(comparison.csv())))


def test_mean_deviation_and_difference_are_those_of_the_samples(tmp_path):
    a, b = [20.0, 22.0, 27.0], [21.0, 24.0, 27.5]
    comparison = compare([run_of(tmp_path / "a", a), run_of(tmp_path / "b", b)])
    assert cell(comparison, "b").mean == pytest.approx(np.mean(b))
    assert cell(comparison, "b").std == pytest.approx(np.std(b, ddof=1))
    assert cell(comparison, "b").difference == pytest.approx(np.mean(b) - np.mean(a))
    assert cell(comparison, "b").n == 3
    assert cell(comparison, "a").difference is None


def test_the_interval_of_a_known_shift_holds_it_about_nineteen_times_in_twenty():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(60):
        low, high = interval_of_mean(0.5 + rng.normal(size=40))
        hits += low <= 0.5 <= high
    assert 51 <= hits <= 60  # 57 expected; fewer than 51 has a probability below 1 %


def test_pairing_removes_the_spread_between_samples(tmp_path):
    rng = np.random.default_rng(0)
    a = rng.normal(25, 5, 30)
    b = a + 0.5 + rng.normal(0, 0.1, 30)
    found = cell(compare([run_of(tmp_path / "a", a), run_of(tmp_path / "b", b)]), "b")
    assert 0.4 < found.low < found.difference < found.high < 0.6


def test_a_single_measurement_has_no_interval(tmp_path):
    found = cell(compare([run_of(tmp_path / "a", [20.0]), run_of(tmp_path / "b", [21.0])]), "b")
    assert (found.std, found.difference, found.low, found.high) == (None, 1.0, None, None)


@pytest.mark.parametrize("differences", [[0.5] * 5, [0.0, 0.0], [1.0, 2.0], [0.0, 0.0, 0.0, 1.0]])
def test_degenerate_differences_give_a_finite_interval_without_a_warning(differences):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        low, high = interval_of_mean(np.array(differences))
    assert low <= np.mean(differences) <= high
    assert (low == high) == (np.ptp(differences) == 0)


def test_the_same_runs_always_give_the_same_interval(tmp_path):
    runs = [run_of(tmp_path / "a", [20.0, 22.0, 27.0]), run_of(tmp_path / "b", [21.0, 24.0, 27.5])]
    assert compare(runs) == compare(runs)


def test_samples_are_joined_by_their_index_not_by_their_order(tmp_path):
    samples = [{"index": i, "measurement": str(i), "psnr": 20.0 + i * i} for i in range(5)]
    shifted = [{**sample, "psnr": sample["psnr"] + 1} for sample in reversed(samples)]
    found = cell(compare([write_run(tmp_path / "a", samples), write_run(tmp_path / "b", shifted)]), "b")
    assert (found.difference, found.low, found.high) == (1.0, 1.0, 1.0)


def test_different_measurements_are_refused_with_both_runs_and_the_first_sample(tmp_path):
    a = run_of(tmp_path / "a", [20.0, 21.0, 22.0])
    samples = [{"index": i, "measurement": h, "psnr": 20.0} for i, h in enumerate(["sr4-0", "other", "another"])]
    with pytest.raises(ValueError, match=r"runs a and b did not see the same measurement of sample 1, draw 0"):
        compare([a, write_run(tmp_path / "b", samples)])


def test_a_measurement_without_a_hash_is_refused(tmp_path):
    runs = [write_run(tmp_path / name, [{"index": 0, "measurement": "", "psnr": 20.0}]) for name in "ab"]
    with pytest.raises(ValueError, match="did not see the same measurement"):
        compare(runs)


def test_only_common_samples_count_and_the_others_are_said(tmp_path):
    a = run_of(tmp_path / "a", [20.0, 21.0, 90.0, 90.0])
    b = run_of(tmp_path / "b", [21.0, 22.0])
    comparison = compare([a, b])
    assert cell(comparison, "a").mean == 20.5
    assert comparison.blocks[0].n == 2
    assert "2 of a" in comparison.markdown()


def test_runs_without_a_common_sample_are_refused(tmp_path):
    b = write_run(tmp_path / "b", [{"index": 7, "measurement": "sr4-7", "psnr": 20.0}])
    with pytest.raises(ValueError, match="runs a, b have no sample in common"):
        compare([run_of(tmp_path / "a", [20.0]), b])


def test_draws_are_averaged_before_anything_else(tmp_path):
    def samples(shift):
        return [
            {"index": i, "draw": d, "measurement": str(i), "psnr": 20.0 + 2 * i + d + shift}
            for i in range(3)
            for d in range(4)
        ]

    once = compare([run_of(tmp_path / "a1", [21.5, 23.5, 25.5]), run_of(tmp_path / "b1", [22.5, 24.5, 26.5])])
    found = cell(compare([write_run(tmp_path / "a4", samples(0)), write_run(tmp_path / "b4", samples(1))]), "b4")
    assert found == cell(once, "b1")
    assert found.n == 3


def test_a_missing_value_is_left_out_of_every_run_and_said(tmp_path):
    a = run_of(tmp_path / "a", [20.0, 21.0, 22.0])
    b = run_of(tmp_path / "b", [21.0, "", math.nan])
    comparison = compare([a, b])
    assert cell(comparison, "a").mean == 20.0
    assert cell(comparison, "a").n == 1
    assert "psnr: samples left out because they have no value: 2 of b" in comparison.markdown()


def test_a_metric_that_the_reference_lacks_has_no_difference(tmp_path):
    a = run_of(tmp_path / "a", [20.0, 21.0])
    comparison = compare([a, run_of(tmp_path / "b", [21.0, 22.0], equivariance_error=[0.1, 0.2])])
    assert cell(comparison, "b", "equivariance_error").difference is None
    assert ("a", "equivariance_error") not in comparison.blocks[0].cells


def test_infinite_psnr_is_shown_as_it_is_without_a_warning(tmp_path):
    a = run_of(tmp_path / "a", [20.0, math.inf])
    b = run_of(tmp_path / "b", [21.0, math.inf])
    c = run_of(tmp_path / "c", [21.0, 30.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        comparison = compare([a, b, c])
    assert cell(comparison, "a").mean == math.inf
    assert cell(comparison, "a").std is None
    assert cell(comparison, "b").difference == 0.5  # both are perfect on the second sample
    assert (cell(comparison, "c").difference, cell(comparison, "c").low) == (-math.inf, None)
    assert "∞" in comparison.markdown()


def test_another_reference_turns_the_sign(tmp_path):
    runs = [run_of(tmp_path / "a", [20.0, 21.0]), run_of(tmp_path / "b", [21.0, 23.0])]
    assert cell(compare(runs, reference="b"), "a").difference == -cell(compare(runs), "b").difference


def test_groups_are_the_runs_with_the_same_measurements_each_with_its_own_reference(tmp_path):
    runs = [
        run_of(tmp_path / "sr4" / "dps", [20.0, 21.0]),
        run_of(tmp_path / "box" / "dps", [30.0, 31.0], task="box"),
        run_of(tmp_path / "box" / "equi", [31.0, 32.0], task="box"),
        run_of(tmp_path / "sr4" / "equi", [22.0, 23.0]),
    ]
    names = ["DPS", "DPS", "Equi-DPS", "Equi-DPS"]
    comparison = compare(runs, names=names, group=True, group_names=["SR", "Box"])
    assert [(block.title, block.reference, block.runs) for block in comparison.blocks] == [
        ("SR", "DPS", ("DPS", "Equi-DPS")),
        ("Box", "DPS", ("DPS", "Equi-DPS")),
    ]
    differences = [block.cells["Equi-DPS", "psnr"].difference for block in comparison.blocks]
    assert differences == [2.0, 1.0]
    assert comparison.markdown().count("## ") == 2
    with pytest.raises(ValueError, match="did not see the same measurement"):
        compare(runs, names=["a", "b", "c", "d"])
    with pytest.raises(ValueError, match="1 group names are given for 2 groups"):
        compare(runs, names=names, group=True, group_names=["SR"])


def test_the_better_mean_is_bold_in_the_direction_of_the_metric(tmp_path):
    a = run_of(tmp_path / "a", [20.0, 21.0], lpips=[0.1, 0.2], data_misfit=[1.0, 1.1], seconds=[3.0, 3.0])
    b = run_of(tmp_path / "b", [22.0, 23.0], lpips=[0.2, 0.3], data_misfit=[1.2, 1.3], seconds=[3.0, 3.0])
    block = compare([a, b]).blocks[0]
    best = {metric: block.best(metric) for metric in ("psnr", "lpips", "data_misfit", "seconds")}
    assert best == {"psnr": {"b"}, "lpips": {"a"}, "data_misfit": set(), "seconds": set()}


def test_the_markdown_page_holds_title_command_count_and_table(tmp_path):
    runs = [run_of(tmp_path / "a", [20.0, 22.0, 24.0]), run_of(tmp_path / "b", [21.0, 23.0, 25.0])]
    page = compare(runs, names=["DPS", "Equi|DPS"], title="Table 1", command="python cli.py compare a b").markdown()
    assert page.startswith("# Table 1\n")
    assert "```\npython cli.py compare a b\n```" in page
    assert "N = 3 measurements, reference: DPS." in page
    assert "| run | psnr ↑ |\n| --- | --- |\n| DPS | 22.00 ± 2.00 |\n" in page
    assert "| Equi\\|DPS | **23.00** ± 2.00<br>+1.00 [+1.00, +1.00] |" in page


def test_the_csv_is_tidy_and_keeps_every_digit(tmp_path):
    a, b = [20.0, 22.0, 24.1], [21.0, 23.0, 25.7]
    comparison = compare([run_of(tmp_path / "a", a), run_of(tmp_path / "b", b)])
    first, second = cells_of_csv(comparison)
    assert list(first) == ["block", "run", "metric", "mean", "std", "n", "difference", "low", "high"]
    assert (first["run"], first["metric"], first["n"], first["difference"]) == ("a", "psnr", "3", "")
    assert float(second["mean"]) == cell(comparison, "b").mean
    assert float(second["low"]) == cell(comparison, "b").low


def test_a_number_of_the_whole_run_is_shown_without_a_spread(tmp_path):
    samples = [{"index": i, "measurement": str(i), "psnr": 20.0 + i} for i in range(3)]
    runs = [
        write_run(tmp_path / name, samples, {"count": 3, "metrics": {"psnr": {"mean": 21.0}, "fid": fid}})
        for name, fid in (("a", 30.0), ("b", 25.0))
    ]
    comparison = compare(runs)
    assert comparison.metrics == ("psnr", "fid")
    assert (cell(comparison, "b", "fid").difference, cell(comparison, "b", "fid").std) == (-5.0, None)

    shorter = run_of(tmp_path / "c", [20.0, 21.0], task="")
    (tmp_path / "c" / "metrics.csv").write_text("index,draw,name,measurement,psnr\n0,0,,0,20.0\n1,0,,1,21.0\n")
    comparison = compare([runs[0], shorter])
    assert ("a", "fid") not in comparison.blocks[0].cells
    assert "fid: left out" in comparison.markdown()


@pytest.mark.parametrize("width", [40, 80, 300])
def test_the_table_fits_the_terminal(tmp_path, width):
    metrics = {name: [0.1, 0.2] for name in ("ssim", "lpips", "equivariance_error", "equivariance_error_before")}
    runs = [run_of(tmp_path / name, [20.0, 21.0], **metrics) for name in ("a" * 50, "b")]
    console = Console(file=io.StringIO(), width=width)
    compare(runs).print(console)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert all(metric in text for metric in ("psnr", *metrics))
    assert "20.50 ± 0.71" in text


def test_names_of_runs_are_the_shortest_ends_of_the_paths_that_differ(tmp_path):
    runs = [run_of(tmp_path / name / "dps", [20.0]) for name in ("one", "two")]
    assert compare(runs).blocks[0].runs == ("one/dps", "two/dps")


def test_metrics_are_shown_in_the_order_asked_for(tmp_path):
    run = run_of(tmp_path / "a", [20.0], ssim=[0.5], lpips=[0.1])
    assert compare([run], metrics=["lpips", "psnr"]).metrics == ("lpips", "psnr")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": ["one"]}, "1 names are given for 2 runs"),
        ({"names": ["one", "one"]}, "same name"),
        ({"metrics": ["fid"]}, "metric='fid' is in none of the runs; available: psnr"),
        ({"reference": "c"}, "reference='c' is not among the runs a, b"),
        ({"group_names": ["x"]}, "need --group"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, arguments, message):
    runs = [run_of(tmp_path / name, [20.0, 21.0]) for name in "ab"]
    with pytest.raises(ValueError, match=message):
        compare(runs, **arguments)


def test_a_run_given_twice_is_refused(tmp_path):
    run = run_of(tmp_path / "a", [20.0])
    with pytest.raises(ValueError, match="twice"):
        compare([run, f"{run}/"])


def test_the_command_writes_both_files_and_the_command_that_made_them(tmp_path, capsys):
    runs = [run_of(tmp_path / name, [20.0, 21.0]) for name in "ab"]
    stem = tmp_path / "docs" / "table.v1"
    assert compare_command([*runs, "--names", "DPS", "Equi DPS", "--output", str(stem)]) == 0
    assert "psnr" in capsys.readouterr().out
    assert f"python cli.py compare {' '.join(runs)} --names DPS 'Equi DPS'" in stem.with_name("table.v1.md").read_text()
    assert stem.with_name("table.v1.csv").read_text().startswith("block,run,metric")
    assert sorted(path.name for path in stem.parent.iterdir()) == ["table.v1.csv", "table.v1.md"]


def test_the_command_says_in_one_sentence_what_is_wrong(tmp_path, capsys):
    (tmp_path / "b").mkdir()
    for missing, message in (("b", "not finished"), ("c", "is not a folder of a run")):
        assert compare_command([run_of(tmp_path / f"a{missing}", [20.0]), str(tmp_path / missing)]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert message in lines[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("index,draw,name\n0,0,x\n", "no column 'measurement'"),
        ("index,draw,measurement,psnr\n0,0,h,20\n1,0,h\n", "line 3 does not have the 4 values"),
        ("index,draw,measurement,psnr\n0,0,h,abc\n", "line 2: psnr='abc' is not a number"),
        ("index,draw,measurement,psnr\nx,0,h,1\n", "line 2: index='x' is not an integer"),
        ("index,draw,measurement,psnr\n0,0,h,1\n0,0,h,1\n", "line 3 repeats sample 0, draw 0"),
        ("index,draw,measurement,psnr\n", "holds no sample"),
    ],
)
def test_a_damaged_run_is_refused_with_file_and_line(tmp_path, content, message):
    (tmp_path / "metrics.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_run(tmp_path)


def test_a_damaged_summary_is_refused(tmp_path):
    run = run_of(tmp_path / "a", [20.0])
    (tmp_path / "a" / "summary.json").write_text("{")
    with pytest.raises(ValueError, match=r"summary\.json is not valid JSON"):
        read_run(run)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "file.txt"
    atomic_write(path, "first\r\n")
    assert path.read_bytes() == b"first\r\n"
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask

    def fails(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="disk full"):
        atomic_write(path, b"second")
    assert path.read_bytes() == b"first\r\n"
    assert list(path.parent.iterdir()) == [path]


def test_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "file"
    contents = [bytes([i]) * 5000 for i in range(8)]
    threads = [threading.Thread(target=atomic_write, args=(path, content)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in contents


def test_the_header_says_the_direction_of_a_metric_that_has_one(tmp_path):
    run = run_of(tmp_path / "a", [20.0], lpips=[0.1], data_misfit=[1.0])
    assert "| run | psnr ↑ | lpips ↓ | data_misfit |" in compare([run]).markdown()
