import csv
import json
import sys
from pathlib import Path

import pytest

from equireg.commands.sweep import split_values, sweep_command

FILES = ("base", "dps", "task/sr4", "task/box", "equireg/hflip", "other/sr4")


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """A working directory with empty configuration files; without the 0.1 s of a full garbage collection per run."""
    monkeypatch.setattr("gc.collect", lambda: 0)
    monkeypatch.chdir(tmp_path)
    for file in FILES:
        path = Path(f"configs/{file}.yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


class FakeCLI:
    """Stands for cli.py: writes the folder of a run, whose measurements depend on the task; fails as it is told."""

    def __init__(self, fails=None):
        self.calls = []
        self.fails = fails or {}

    def __call__(self, args):
        self.calls.append(args)
        option = dict(word[2:].split("=", 1) for word in args if word.startswith("--") and "=" in word)
        zeta = option.get("model.init_args.zeta", "1")
        if zeta in self.fails:
            return self.fails[zeta]()
        folder = Path(args[args.index("--root") + 1]) / args[args.index("--name") + 1]
        folder.mkdir(parents=True, exist_ok=True)
        task = "box" if "configs/task/box.yaml" in args else "sr4"
        psnr = 20 + float(zeta) * (1 if task == "sr4" else -1)
        rows = "".join(f"{i},0,,{task}-{i},{psnr + i},{float(zeta)}\n" for i in range(3))
        (folder / "metrics.csv").write_text("index,draw,name,measurement,psnr,lpips\n" + rows)
        (folder / "summary.json").write_text('{"count": 3, "metrics": {}}')
        return None


def raises(error):
    def fail():
        raise error

    return fail


def record(name="tune"):
    return json.loads(Path(f"runs/{name}/sweep.json").read_text())


def test_every_combination_runs_once_the_last_axis_fastest():
    cli = FakeCLI()
    args = ["--name", "tune", "--over", "model.init_args.zeta=1,2", "--over", "model.init_args.num_steps=5,10"]
    assert sweep_command(args, cli) == 0
    assert [call[call.index("--name") + 1] for call in cli.calls] == [
        "tune/zeta=1,num_steps=5",
        "tune/zeta=1,num_steps=10",
        "tune/zeta=2,num_steps=5",
        "tune/zeta=2,num_steps=10",
    ]


def test_files_come_first_in_order_then_the_options_then_the_axes():
    cli = FakeCLI()
    sweep_command(
        [
            *["-c", "configs/base.yaml", "--trainer.precision", "32-true", "--config=configs/dps.yaml"],
            *[
                "--over",
                "model.init_args.zeta=-1e-3",
                "--root",
                "runs",
                "--name",
                "tune",
                "--model.init_args.seed",
                "-1",
            ],
            *["--over", "config=configs/task/sr4.yaml+configs/equireg/hflip.yaml"],
        ],
        cli,
    )
    files = ("base", "dps", "task/sr4", "equireg/hflip")
    assert cli.calls == [
        [
            "predict",
            *(word for file in files for word in ("-c", f"configs/{file}.yaml")),
            *("--name", "tune/zeta=-1e-3,config=sr4+hflip", "--root", "runs"),
            *("--trainer.precision", "32-true", "--model.init_args.seed", "-1"),
            "--model.init_args.zeta=-1e-3",
        ]
    ]


def test_a_config_axis_is_named_after_its_folder_and_an_empty_value_adds_nothing():
    cli = FakeCLI()
    sweep_command(["--name", "tune", "--over", "config=,configs/equireg/hflip.yaml"], cli)
    assert [call[call.index("--name") + 1] for call in cli.calls] == ["tune/equireg=none", "tune/equireg=hflip"]
    assert "-c" not in cli.calls[0]
    assert cli.calls[1][1:3] == ["-c", "configs/equireg/hflip.yaml"]


def test_axes_with_the_same_last_word_keep_their_whole_key():
    cli = FakeCLI()
    sweep_command(["--name", "tune", "--over", "model.init_args.seed=0", "--over", "data.init_args.seed=1"], cli)
    assert record()["settings"][0]["name"] == "model.init_args.seed=0,data.init_args.seed=1"


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1,2", ["1", "2"]),
        ("[1,2],[3]", ["[1,2]", "[3]"]),
        ('{"a": [1, 2], "b": "x]"},null', ['{"a": [1, 2], "b": "x]"}', "null"]),
        ('"a,b",c', ['"a,b"', "c"]),
        (",x", ["", "x"]),
    ],
)
def test_commas_inside_brackets_and_quotes_belong_to_a_value(text, values):
    assert split_values(text) == values


def test_names_of_runs_are_plain_folders():
    cli = FakeCLI()
    sweep_command(["--name", "tune", "--over", 'model.x=[1, 2],../a b,{"p":"q|r"}'], cli)
    folders = [Path(setting["folder"]) for setting in record()["settings"]]
    assert [folder.name for folder in folders] == ["x=1-2", "x=..-a-b", "x=p-q-r"]
    assert all(folder.parent == Path("runs/tune") for folder in folders)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "nothing to vary"),
        (["--over", "zeta"], "'zeta' must be key=value"),
        (["--over", "=1,2"], "must be key=value"),
        (["--over", "zeta="], "has no value"),
        (["--over", "zeta=1,,2"], "an empty value"),
        (["--over", "config="], "has no value"),
        (["--over", "zeta=[1,2"], "brackets"),
        (["--over", "zeta=1,2", "--over", "zeta=3"], "zeta is given twice"),
        (["--over", "name=a,b"], "the sweep itself sets name"),
        (["--over", "zeta=1,1"], "same name, zeta=1"),
        (["--over", "x=[1],1"], "same name, x=1"),
        (["--over", "config=configs/task/sr4.yaml,configs/other/sr4.yaml"], "same name, config=sr4"),
        (["--over", "config=configs/none.yaml"], "configuration file configs/none.yaml does not exist"),
        (["-c", "configs/none.yaml", "--over", "zeta=1"], "configuration file configs/none.yaml does not exist"),
        (["--over", f"x={'a' * 300}"], "too long"),
        (["--over", "zeta=1", "--metric", "data_misfit"], "metric='data_misfit' has no best value"),
        (["stray", "--over", "zeta=1"], "'stray' does not belong to an option"),
        (["--over", "zeta=1", "--name", "../out"], "must be the name of a folder"),
    ],
)
def test_bad_input_is_refused_in_one_sentence_before_anything_runs(args, message, capsys):
    cli = FakeCLI()
    assert sweep_command(["--name", "tune", *args], cli) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert cli.calls == []
    assert not Path("runs").exists()


def test_a_dry_run_prints_the_runs_and_does_nothing(capsys):
    cli = FakeCLI()
    args = ["--name", "tune", "-c", "configs/base.yaml", "--over", "model.init_args.zeta=1,2", "--dry_run"]
    assert sweep_command(args, cli) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"python cli.py predict -c configs/base.yaml --name tune/zeta={zeta} --root runs --model.init_args.zeta={zeta}"
        for zeta in (1, 2)
    ]
    assert cli.calls == []
    assert not Path("runs").exists()


def exit_code():
    return 3


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (raises(SystemExit(2)), "exit 2"),
        (raises(SystemExit(0)), "exit 0"),
        (raises(ValueError("no such operator")), "ValueError: no such operator"),
        (exit_code, "exit 3"),
        (lambda: None, "FileNotFoundError"),
    ],
)
def test_a_failed_setting_is_counted_and_the_others_go_on(failure, error, capsys):
    cli = FakeCLI(fails={"2": failure})
    assert sweep_command(["--name", "tune", "--over", "model.init_args.zeta=1,2,3"], cli) == 1
    assert len(cli.calls) == 3
    settings = record()["settings"]
    assert [setting["status"] for setting in settings] == ["finished", "failed", "finished"]
    assert settings[1]["error"].startswith(error)
    assert settings[1]["metrics"] == {}
    assert "zeta=2 failed" in capsys.readouterr().err
    assert "1 of 3 settings failed: zeta=2" in Path("runs/tune/sweep.md").read_text()


def test_a_failed_setting_is_not_shown_with_the_numbers_of_an_earlier_run():
    args = ["--name", "tune", "--over", "model.init_args.zeta=1,2"]
    sweep_command(args, FakeCLI())
    assert sweep_command(args, FakeCLI(fails={"2": exit_code})) == 1
    with open("runs/tune/sweep.csv") as file:
        assert {row["run"] for row in csv.DictReader(file)} == {"zeta=1"}


def test_all_failed_leaves_a_record_and_no_table():
    assert sweep_command(["--name", "tune", "--over", "model.init_args.zeta=1"], FakeCLI(fails={"1": exit_code})) == 1
    assert record()["groups"] == []
    assert not Path("runs/tune/sweep.md").exists()


def test_control_c_stops_the_sweep_also_after_lightning_turned_it_into_an_exit():
    def interrupted():
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    cli = FakeCLI(fails={"2": interrupted})
    with pytest.raises(SystemExit):
        sweep_command(["--name", "tune", "--over", "model.init_args.zeta=1,2,3"], cli)
    assert len(cli.calls) == 2
    assert [setting["status"] for setting in record()["settings"]] == ["finished", "not run", "not run"]


def test_the_same_command_again_completes_the_sweep():
    args = ["--name", "tune", "--over", "model.init_args.zeta=1,2"]
    assert sweep_command(args, FakeCLI(fails={"2": exit_code})) == 1
    again = FakeCLI()
    assert sweep_command(args, again) == 0
    assert len(again.calls) == 2  # the run itself knows what is missing
    assert [setting["status"] for setting in record()["settings"]] == ["finished", "finished"]


def test_the_record_names_the_best_setting_of_each_group():
    tasks = "config=configs/task/sr4.yaml,configs/task/box.yaml"
    args = ["--name", "tune", "--over", tasks, "--over", "model.init_args.zeta=1,2"]
    assert sweep_command(args, FakeCLI()) == 0
    found = record()
    assert found["command"] == f"python cli.py sweep --name tune --over {tasks} --over model.init_args.zeta=1,2"
    assert [(group["name"], group["best"]["name"], group["best"]["psnr"]) for group in found["groups"]] == [
        ("task=sr4", "task=sr4,zeta=2", 23.0),
        ("task=box", "task=box,zeta=1", 20.0),
    ]
    assert found["settings"][3]["values"] == {"task": "configs/task/box.yaml", "zeta": "2"}
    assert found["settings"][3]["metrics"] == {"psnr": 19.0, "lpips": 2.0}
    with open("runs/tune/sweep.csv") as file:
        rows = {(row["block"], row["run"], row["metric"]): row for row in csv.DictReader(file)}
    assert float(rows["task=sr4", "zeta=2", "psnr"]["difference"]) == 1.0
    assert "## task=box" in Path("runs/tune/sweep.md").read_text()


def test_the_best_setting_follows_the_direction_of_the_metric():
    args = ["--name", "tune", "--over", "model.init_args.zeta=1,2", "--metric", "lpips"]
    sweep_command(args, FakeCLI())
    assert record()["groups"][0]["best"] == {"name": "zeta=1", "values": {"zeta": "1"}, "lpips": 1.0}


def test_a_metric_that_no_run_measured_has_no_best_setting():
    sweep_command(["--name", "tune", "--over", "model.init_args.zeta=1,2", "--metric", "ssim"], FakeCLI())
    assert record()["groups"][0]["best"] is None
    assert "no run measured ssim" in Path("runs/tune/sweep.md").read_text()


def test_an_infinite_mean_is_still_valid_json():
    sweep_command(["--name", "tune", "--over", "model.init_args.zeta=inf,1"], FakeCLI())
    found = record()
    assert found["settings"][0]["metrics"]["psnr"] == "inf"
    assert found["groups"][0]["best"]["name"] == "zeta=inf"


def test_help_is_readable(capsys):
    with pytest.raises(SystemExit) as stop:
        sweep_command(["--help"], FakeCLI())
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--over KEY=V1,V2" in text
    assert "example: python cli.py sweep" in text
