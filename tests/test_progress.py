"""What a user sees of a run while it goes on."""

import re

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from callbacks import StepProgressBar
from callbacks.progress import Tqdm
from tests.tiny_run import STEPS, TinyData, TinySampler, predict


@pytest.fixture
def terminal(monkeypatch):
    """Pretends that the output is one; pytest exchanges sys.stdout itself."""
    monkeypatch.setattr("callbacks.progress._in_terminal", lambda: True)


@pytest.fixture
def bars(monkeypatch):
    """All bars that were opened, with every position they took."""
    opened = []

    class Spy(Tqdm):
        def __init__(self, *args, **kwargs):
            self.positions = []
            super().__init__(*args, **kwargs)
            opened.append(self)

        def update(self, n=1):
            super().update(n)
            self.positions.append(round(self.n, 6))

    monkeypatch.setattr("callbacks.progress.Tqdm", Spy)
    return opened


def run_with_bar(tmp_path, sampler, data):
    bar = StepProgressBar()
    trainer = predict(tmp_path / "run", bar, sampler=sampler, data=data, enable_progress_bar=True)
    return bar, trainer


def test_the_outer_bar_advances_with_every_step(tmp_path, terminal, bars):
    run_with_bar(tmp_path, TinySampler(), TinyData(count=3, batch_size=2))
    outer, inner = bars
    assert outer.total == 2
    assert outer.positions == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2], abs=1e-5)
    assert inner.positions == [1, 2, 3, 1, 2, 3]
    assert inner.total == STEPS


def test_the_time_left_is_that_of_the_whole_run_within_the_first_batch(tmp_path, terminal, bars):
    left = []

    class Look(TinySampler):
        def emit(self, step, x0_hat):
            super().emit(step, x0_hat)
            outer = bars[0].format_dict
            left.append((outer["total"] - outer["n"]) / outer["n"])

    run_with_bar(tmp_path, Look(), TinyData(count=4, batch_size=1))
    assert left[0] == pytest.approx(11)  # one of twelve steps is done


def test_the_bars_are_closed_and_the_listener_is_gone_after_a_run(tmp_path, terminal, bars):
    sampler = TinySampler()
    run_with_bar(tmp_path, sampler, TinyData(count=1))
    assert all(bar.disable for bar in bars)  # tqdm's mark of a closed bar
    assert sampler.listeners == []


def test_the_bars_are_closed_and_the_listener_is_gone_after_a_crash(tmp_path, terminal, bars):
    sampler = TinySampler(raises_at=(1,))
    with pytest.raises(ArithmeticError):
        run_with_bar(tmp_path, sampler, TinyData(batch_size=1))
    assert all(bar.disable for bar in bars)
    assert sampler.listeners == []


def test_without_a_terminal_there_are_few_lines_and_no_control_characters(tmp_path, capsys):
    run_with_bar(tmp_path, TinySampler(num_steps=40), TinyData(count=2, batch_size=1))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Predicting")]
    assert len(lines) == 10
    assert lines[0].startswith("Predicting: 10 %, 0.20 of 2 batches, 00:00 elapsed, 00:0")
    assert lines[-1].startswith("Predicting: 100 %, 2.00 of 2 batches")
    assert not re.search(r"[\r\x1b]", "".join(lines))


def test_a_sampler_without_steps_advances_batch_by_batch(tmp_path, capsys):
    class Silent(TinySampler):
        def emit(self, step, x0_hat):
            pass

    run_with_bar(tmp_path, Silent(), TinyData(count=2, batch_size=1))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Predicting")]
    assert [line.split(",")[0] for line in lines] == ["Predicting: 50 %", "Predicting: 100 %"]


def test_modules_without_steps_get_a_bar_over_batches(tmp_path, terminal, bars):
    class Module(LightningModule):
        def predict_step(self, batch, batch_idx):
            return batch

    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[StepProgressBar()],
    )
    trainer.predict(Module(), DataLoader(dataset=torch.zeros(2, 1), batch_size=1), return_predictions=False)
    assert len(bars) == 1
    assert bars[0].n == 2
