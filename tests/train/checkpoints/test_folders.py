"""A checkpoint is whole or not there; resuming as another run is refused."""

import errno
import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from llmt_shared.errors import ConfigError, FormatError, Stopped
from llmt_train import checkpoints
from llmt_train.checkpoints import State

CONFIG = {"optim": {"lr": 0.1, "clip": 1.0}, "train": {"steps": 10, "seed": 1}, "save": {"every": 2}, "log": ["jsonl"]}
MODEL = {"model_type": "llama", "hidden_size": 8, "transformers_version": "5.0"}


def make_state(step: int, **changes: object) -> State:
    fields = {"step": step, "rows_consumed": 4 * step, "rows_per_step": 4, "digest": "d" * 64, "seed": 1}
    return State(**(fields | changes))


def save(run: Path, step: int, eval_loss: float | None = None) -> Path:
    documents, state = {"config.yaml": CONFIG, "config.json": MODEL}, make_state(step, eval_loss=eval_loss)
    return checkpoints.save_checkpoint(run, state, documents, lambda path: path.write_bytes(b"weights"))


def kept(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    folder = save(tmp_path, 200)
    assert folder.name == "step-00000200"
    state = checkpoints.read_state(folder)
    assert state.model_copy(update={"files": {}}) == make_state(200)
    assert state.files[checkpoints.WEIGHTS] == 7
    assert checkpoints.read_config(folder) == CONFIG
    assert checkpoints.read_json(folder, "config.json") == MODEL
    assert {"python", "versions", "device"} <= checkpoints.read_json(folder, "environment.json").keys()


def test_the_newest_complete_checkpoint_is_found(tmp_path: Path) -> None:
    assert checkpoints.newest_checkpoint(tmp_path) is None
    save(tmp_path, 9)
    newest = save(tmp_path, 10)
    assert checkpoints.newest_checkpoint(tmp_path) == newest


@pytest.mark.parametrize("damage", ["truncate", "remove", "no state", "bad state"])
def test_a_torn_checkpoint_is_passed_over(tmp_path: Path, damage: str) -> None:
    older, torn = save(tmp_path, 1), save(tmp_path, 2)
    match damage:
        case "truncate":
            (torn / checkpoints.WEIGHTS).write_bytes(b"w")
        case "remove":
            (torn / "config.json").unlink()
        case "no state":
            (torn / "state.json").unlink()
        case "bad state":
            (torn / "state.json").write_text("{")
    assert checkpoints.newest_checkpoint(tmp_path) == older


def test_a_torn_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    (save(tmp_path, 1) / "state.json").unlink()
    assert checkpoints.newest_checkpoint(tmp_path) is None
    whole = save(tmp_path, 1)
    assert checkpoints.newest_checkpoint(tmp_path) == whole


def test_an_unfinished_folder_is_ignored_and_cleared(tmp_path: Path) -> None:
    unfinished = tmp_path / "checkpoints" / ".step-00000003.partial"  # what a kill leaves
    unfinished.mkdir(parents=True)
    (unfinished / checkpoints.WEIGHTS).write_bytes(b"half")
    assert checkpoints.newest_checkpoint(tmp_path) is None
    folder = save(tmp_path, 4)
    checkpoints.prune(tmp_path, 2)
    assert list((tmp_path / "checkpoints").iterdir()) == [folder]


def test_the_newest_stay(tmp_path: Path) -> None:
    for step in (1, 2, 10, 11):
        save(tmp_path, step)
    checkpoints.prune(tmp_path, 2)
    assert kept(tmp_path) == [10, 11]


def test_the_best_stay_beside_the_newest(tmp_path: Path) -> None:
    for step, loss in enumerate([3.0, 2.0, 1.0, 1.5, 2.5, 2.7]):
        save(tmp_path, step, loss)
        checkpoints.prune(tmp_path, 2, keep_best=2)
    assert kept(tmp_path) == [2, 3, 4, 5]
    assert [path.name[-1] for path in checkpoints.best_checkpoints(tmp_path, 9)] == ["2", "3", "4", "5"]


def test_one_that_is_both_takes_one_place_of_each(tmp_path: Path) -> None:
    for step, loss in enumerate([3.0, 2.0, 1.0]):
        save(tmp_path, step, loss)
    checkpoints.prune(tmp_path, 1, keep_best=2)
    assert kept(tmp_path) == [1, 2]


def test_of_equal_losses_the_earlier_is_better(tmp_path: Path) -> None:
    for step, loss in enumerate([2.0, 1.0, 1.0, 2.0]):
        save(tmp_path, step, loss)
    checkpoints.prune(tmp_path, 1, keep_best=1)
    assert kept(tmp_path) == [1, 3]


def test_a_checkpoint_without_a_held_out_loss_is_never_among_the_best(tmp_path: Path) -> None:
    for step, loss in enumerate([None, 2.0, None, None]):
        save(tmp_path, step, loss)
    checkpoints.prune(tmp_path, 1, keep_best=3)
    assert kept(tmp_path) == [1, 3]
    assert len(checkpoints.best_checkpoints(tmp_path, 3)) == 1


@pytest.mark.parametrize("damage", ["torn", "set aside"])
def test_a_damaged_checkpoint_is_not_among_the_best(tmp_path: Path, damage: str) -> None:
    for step, loss in enumerate([2.0, 1.0, 3.0]):
        save(tmp_path, step, loss)
    best = tmp_path / "checkpoints" / "step-00000001"
    if damage == "torn":
        (best / checkpoints.WEIGHTS).unlink()
    else:
        best.rename(best.with_name(f"damaged-{best.name}"))
    checkpoints.prune(tmp_path, 1, keep_best=1)
    assert kept(tmp_path) == [0, 2]
    assert (tmp_path / "checkpoints" / "damaged-step-00000001").exists() == (damage == "set aside")


def test_a_state_of_before_there_were_held_out_losses_is_read(tmp_path: Path) -> None:
    folder = save(tmp_path, 1, 2.0)
    state = json.loads((folder / "state.json").read_text())
    del state["eval_loss"]
    (folder / "state.json").write_text(json.dumps(state))
    assert checkpoints.read_state(folder).eval_loss is None


def test_a_torn_checkpoint_takes_no_whole_ones_place(tmp_path: Path) -> None:
    whole, torn = save(tmp_path, 5), save(tmp_path, 6)
    (torn / checkpoints.WEIGHTS).write_bytes(b"")
    checkpoints.prune(tmp_path, 1)
    assert list((tmp_path / "checkpoints").iterdir()) == [whole]


def test_what_is_no_checkpoint_is_never_removed(tmp_path: Path) -> None:
    folder = save(tmp_path, 5)
    notes, mine = folder.parent / "step-notes.txt", folder.parent / "step-mine"
    notes.write_text("mine")
    mine.mkdir()
    checkpoints.prune(tmp_path, 1)
    assert set(folder.parent.iterdir()) == {folder, notes, mine}


def test_weights_go_straight_to_their_place(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "no such folder"))
    file = checkpoints.WeightsFile()
    file.save_checkpoint({"a": torch.arange(3)}, tmp_path / "weights")
    assert file.load_checkpoint(tmp_path / "weights")["a"].tolist() == [0, 1, 2]


def test_a_full_disk_is_an_oserror_and_not_torchs_own(tmp_path: Path) -> None:
    code = f"""
import resource, torch
from llmt_train.checkpoints import WeightsFile
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    WeightsFile().save_checkpoint({{"a": torch.zeros(100_000)}}, {str(tmp_path / "weights")!r})
except OSError as error:
    print(error.errno)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.stdout.strip() == str(errno.EFBIG), done.stderr


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.folder,)


def test_a_checkpoint_that_holds_code_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "trap": Trap(tmp_path / "sprung")}, tmp_path / "weights")
    with pytest.raises(FormatError, match="something else than tensors and plain data"):
        checkpoints.read_weights(tmp_path / "weights")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04" + bytes(100)])
def test_a_damaged_weights_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "weights").write_bytes(content)
    with pytest.raises(FormatError, match=r"weights: cannot be read"):
        checkpoints.read_weights(tmp_path / "weights")


def test_a_flipped_bit_of_a_weights_file_changes_nothing_or_is_a_format_error(tmp_path: Path) -> None:
    """Of a zip archive's directory too, where Python's reader raises whatever the bytes make of it."""
    folder = tmp_path / "checkpoints" / "step-00000002"
    checkpoints.save_checkpoint(tmp_path, make_state(2), {"config.yaml": CONFIG}, lambda path: torch.save({}, path))
    path = folder / checkpoints.WEIGHTS
    sound = path.read_bytes()
    for place in range(len(sound) - 1200, len(sound)):
        for bit in (0, 3, 7):
            content = bytearray(sound)
            content[place] ^= 1 << bit
            path.write_bytes(content)
            with suppress(FormatError):
                assert checkpoints.read_weights(path) == {}


def test_files_are_copied_at_any_depth_and_an_error_is_the_systems(tmp_path: Path) -> None:
    (tmp_path / "a" / "deep").mkdir(parents=True)
    (tmp_path / "a" / "deep" / "x").write_text("1")
    checkpoints.copy_files(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b" / "deep" / "x").read_text() == "1"
    (tmp_path / "c").write_text("a file")
    with pytest.raises(OSError) as caught:  # noqa: PT011  the number is looked at
        checkpoints.copy_files(tmp_path / "a", tmp_path / "c")
    assert caught.value.errno is not None


def test_a_full_disk_stops_the_run_and_keeps_what_was_saved(tmp_path: Path) -> None:
    older = save(tmp_path, 1)

    def full(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    wanted = r"No space left on device.*saved up to step 1; make room.*resume"
    with pytest.raises(Stopped, match=wanted), checkpoints.stopped_by_full_disk(tmp_path):
        checkpoints.save_checkpoint(tmp_path, make_state(2), {}, full)
    assert list((tmp_path / "checkpoints").iterdir()) == [older]


def test_a_path_means_itself_or_the_newest_of_its_run(tmp_path: Path) -> None:
    older, newest = save(tmp_path, 1), save(tmp_path, 2)
    assert checkpoints.find_checkpoint(tmp_path) == newest
    assert checkpoints.find_checkpoint(older) == older
    (older / checkpoints.WEIGHTS).unlink()
    with pytest.raises(FormatError, match="missing or truncated"):
        checkpoints.find_checkpoint(older)
    with pytest.raises(FormatError, match="no complete checkpoint"):
        checkpoints.find_checkpoint(tmp_path / "checkpoints")
    with pytest.raises(ConfigError, match="no such folder"):
        checkpoints.find_checkpoint(tmp_path / "nowhere")


def test_the_same_run_may_resume(tmp_path: Path) -> None:
    newer = MODEL | {"transformers_version": "6.0", "key_of_a_later_release": 1}
    checkpoints.check_resumable(save(tmp_path, 2), make_state(2), CONFIG, newer)


def test_settings_that_change_no_result_may_change(tmp_path: Path) -> None:
    config = CONFIG | {"save": {"every": 5}, "log": ["jsonl", "tensorboard"], "train": {"steps": 20, "seed": 1}}
    checkpoints.check_resumable(save(tmp_path, 2), make_state(2), config, MODEL)


@pytest.mark.parametrize(
    ("state", "config", "model", "word"),
    [
        ({"digest": "e" * 64}, {}, {}, "dataset digest: 'dddddddddddddddd' in the checkpoint, 'eeeeeeeeeeeeeeee' now"),
        ({"rows_per_step": 8}, {}, {}, "rows of a step: 4 in the checkpoint, 8 now"),
        ({"rows_consumed": 7}, {}, {}, "rows of all steps (the last one was short): 8 in the checkpoint, 7 now"),
        ({}, {"train": {"steps": 10, "seed": 2}}, {}, "train.seed: 1 in the checkpoint, 2 now"),
        ({}, {"optim": {"lr": 0.2, "clip": 1.0}}, {}, "optim.lr: 0.1 in the checkpoint, 0.2 now"),
        ({}, {}, {"hidden_size": 16}, "model's hidden_size: 8 in the checkpoint, 16 now"),
    ],
)
def test_another_run_may_not(tmp_path: Path, state: dict, config: dict, model: dict, word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        checkpoints.check_resumable(save(tmp_path, 2), make_state(2, **state), CONFIG | config, MODEL | model)
    assert word in str(caught.value)
    assert "--force" in str(caught.value)


def test_every_difference_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        checkpoints.check_resumable(save(tmp_path, 2), make_state(2, digest="e"), {}, MODEL | {"hidden_size": 1})
    assert str(caught.value).count("in the checkpoint") == 4  # digest, optim.lr, train.seed, hidden_size


def test_a_damaged_config_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    (folder / "config.yaml").write_text("a: [")
    (folder / "config.json").write_text(json.dumps(MODEL)[:-3])
    with pytest.raises(FormatError, match=r"config\.yaml"):
        checkpoints.read_config(folder)
    with pytest.raises(FormatError, match=r"config\.json"):
        checkpoints.read_json(folder, "config.json")


def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "lightning.ckpt")

    monkeypatch.setattr(checkpoints.zipfile, "ZipFile", refuse)
    with pytest.raises(PermissionError):
        checkpoints.set_damaged_aside(tmp_path)
    assert checkpoints.newest_checkpoint(tmp_path).name == "step-00000001"
