"""Checkpoints written while the training goes on are those of the moment when they were asked for."""

import errno
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from train.checkpoints.test_folders import CONFIG, kept, make_state
from train.parallel.ranks import on_ranks
from train.saved import read_whole

from llmt_train import checkpoints
from llmt_train.checkpoints.sharded import Writing
from llmt_train.config.run import SaveConfig
from llmt_train.parallel.together import by_first, own_rank

NOW, LATER = SaveConfig(keep=2), SaveConfig(keep=2, asynchronous=True)


def training() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def save(saver: checkpoints.Saver, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    snapshot = checkpoints.take({"epoch": step}, model, [optimizer], trained_alone=False)
    saver.save(make_state(step), {"config.yaml": CONFIG}, snapshot)


def weight_of(run: Path, step: int) -> list[list[float]]:
    return read_whole(run / "checkpoints" / f"step-{step:08d}" / "tensors", "model.weight").tolist()


class Held:
    """Lets nothing be written until it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may_go_on = threading.Event()
        finish = Writing.finish

        def wait(writing: Writing) -> list[Path]:
            assert self.may_go_on.wait(60)
            return finish(writing)

        monkeypatch.setattr(Writing, "finish", wait)


def test_a_checkpoint_is_written_at_once_or_beside_the_training(tmp_path: Path, monkeypatch) -> None:
    model, optimizer = training()
    with checkpoints.Saver(tmp_path, NOW) as saver:
        save(saver, 1, model, optimizer)
        assert kept(tmp_path) == [1]
    held = Held(monkeypatch)
    with checkpoints.Saver(tmp_path, LATER) as saver:
        save(saver, 2, model, optimizer)
        before = model.weight.tolist()
        with torch.no_grad():
            model.weight.zero_()  # the training goes on
        assert kept(tmp_path) == [1]
        held.may_go_on.set()
    assert kept(tmp_path) == [1, 2]
    assert weight_of(tmp_path, 2) == before
    checkpoints.check_undamaged(tmp_path / "checkpoints" / "step-00000002")


def test_one_checkpoint_waits_for_another_and_older_ones_go(tmp_path: Path) -> None:
    model, optimizer = training()
    with checkpoints.Saver(tmp_path, LATER) as saver:
        for step in range(1, 6):
            save(saver, step, model, optimizer)
            assert step == 1 or step - 1 in kept(tmp_path)
    assert kept(tmp_path) == [4, 5]
    assert {path.name[0] for path in (tmp_path / "checkpoints").iterdir()} == {"s"}  # no temporary folder is left


def full_disk(_: Writing) -> list[Path]:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_an_error_of_writing_is_raised_at_the_next_checkpoint_or_at_the_end(tmp_path: Path, monkeypatch) -> None:
    model, optimizer = training()
    monkeypatch.setattr(Writing, "finish", full_disk)
    saver = checkpoints.Saver(tmp_path, LATER)
    save(saver, 1, model, optimizer)
    with pytest.raises(OSError, match="No space left"):
        save(saver, 2, model, optimizer)
    with pytest.raises(OSError, match="No space left"), saver:
        save(saver, 3, model, optimizer)
    save(saver, 4, model, optimizer)
    with pytest.raises(ZeroDivisionError), saver:
        _ = 1 / 0  # what ends the training is what is told
    assert list((tmp_path / "checkpoints").iterdir()) == []


def save_and_train(run: Path) -> list[int]:
    """The training exchanges things while the ranks write; what it gets is what was sent."""
    model, optimizer = training()
    found = []
    with checkpoints.Saver(run, LATER) as saver:
        for step in (1, 2, 3):
            save(saver, step, model, optimizer)
            for number in range(20):
                total = torch.tensor(own_rank() + number)
                dist.all_reduce(total)
                found.append(int(total) - 2 * number + by_first(lambda: 10 * own_rank()))
    return found


def test_ranks_write_together_while_they_train_together(tmp_path: Path) -> None:
    assert on_ranks(2, save_and_train, tmp_path) == [[1] * 60] * 2
    assert kept(tmp_path) == [2, 3]
    checkpoints.check_undamaged(tmp_path / "checkpoints" / "step-00000003")
