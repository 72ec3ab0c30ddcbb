"""A checkpoint is whole or not there; resuming as another run is refused."""

import errno
import json
import zlib
from pathlib import Path

import pytest
from train.parallel.ranks import on_ranks

from llmt_shared import durable
from llmt_shared.errors import ConfigError, FormatError, Stopped
from llmt_train import checkpoints
from llmt_train.checkpoints import State, damage
from llmt_train.parallel.together import agreed, own_rank

WEIGHTS = "tensors/weights"
CONFIG = {"optim": {"lr": 0.1, "clip": 1.0}, "train": {"steps": 10, "seed": 1}, "save": {"every": 2}, "log": ["jsonl"]}
MODEL = {"model_type": "llama", "hidden_size": 8, "transformers_version": "5.0"}


def make_state(step: int, **changes: object) -> State:
    fields = {"step": step, "rows_consumed": 4 * step, "rows_per_step": 4, "digest": "d" * 64, "seed": 1}
    return State(**(fields | changes))


def save(run: Path, step: int, eval_loss: float | None = None) -> Path:
    documents, state = {"config.yaml": CONFIG, "config.json": MODEL}, make_state(step, eval_loss=eval_loss)
    return checkpoints.save_checkpoint(run, state, documents, write)


def write(folder: Path) -> list[Path]:
    """What a training would write."""
    path = folder / checkpoints.TENSORS / "weights"
    path.parent.mkdir()
    path.write_bytes(b"weights")
    return [path]


def kept(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    folder = save(tmp_path, 200)
    assert folder.name == "step-00000200"
    state = checkpoints.read_state(folder)
    assert state.model_copy(update={"files": {}, "checksums": {}}) == make_state(200, format=2)
    assert state.files["tensors/weights"] == 7
    assert state.checksums["tensors/weights"] == zlib.crc32(b"weights")
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names - {"state.json"} == state.files.keys() == state.checksums.keys()
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
            (torn / WEIGHTS).write_bytes(b"w")
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
    (unfinished / "tensors").mkdir(parents=True)
    (unfinished / WEIGHTS).write_bytes(b"half")
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
        (best / WEIGHTS).unlink()
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
    (torn / WEIGHTS).write_bytes(b"")
    checkpoints.prune(tmp_path, 1)
    assert list((tmp_path / "checkpoints").iterdir()) == [whole]


def test_what_is_no_checkpoint_is_never_removed(tmp_path: Path) -> None:
    folder = save(tmp_path, 5)
    notes, mine = folder.parent / "step-notes.txt", folder.parent / "step-mine"
    notes.write_text("mine")
    mine.mkdir()
    checkpoints.prune(tmp_path, 1)
    assert set(folder.parent.iterdir()) == {folder, notes, mine}


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

    def full(folder: Path) -> list[Path]:
        write(folder)
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    wanted = r"No space left on device.*saved up to step 1; make room.*resume"
    with pytest.raises(Stopped, match=wanted), checkpoints.stopped_by_full_disk(tmp_path):
        checkpoints.save_checkpoint(tmp_path, make_state(2), {}, full)
    assert list((tmp_path / "checkpoints").iterdir()) == [older]


def test_a_path_means_itself_or_the_newest_of_its_run(tmp_path: Path) -> None:
    older, newest = save(tmp_path, 1), save(tmp_path, 2)
    assert checkpoints.find_checkpoint(tmp_path) == newest
    assert checkpoints.find_checkpoint(older) == older
    (older / WEIGHTS).unlink()
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


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_of_any_file_is_found_and_the_checkpoint_set_aside(tmp_path: Path) -> None:
    for name in checkpoints.read_state(save(tmp_path, 1)).files:
        older, newest = save(tmp_path, 1), save(tmp_path, 2)
        flip(newest / name)
        with pytest.raises(FormatError, match=f"the checksum of {name} is wrong"):
            checkpoints.check_undamaged(newest)
        [told] = checkpoints.set_damaged_aside(tmp_path)
        assert f"the checksum of {name} is wrong; set aside as damaged-step-00000002" in told
        assert checkpoints.newest_checkpoint(tmp_path) == older
        checkpoints.check_undamaged(older)


def test_all_damaged_checkpoints_above_a_sound_one_are_set_aside(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        flip(save(tmp_path, step) / WEIGHTS)
    sound = save(tmp_path, 2)
    assert len(checkpoints.set_damaged_aside(tmp_path)) == 1
    assert checkpoints.newest_checkpoint(tmp_path) == sound
    assert kept(tmp_path) == [1, 2]  # nobody would use the first
    flip(sound / WEIGHTS)
    assert len(checkpoints.set_damaged_aside(tmp_path)) == 2
    assert checkpoints.newest_checkpoint(tmp_path) is None


def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(tmp_path: Path, monkeypatch) -> None:
    newest = save(tmp_path, 1)

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", WEIGHTS)

    monkeypatch.setattr(damage, "print_of", refuse)
    with pytest.raises(PermissionError):
        checkpoints.set_damaged_aside(tmp_path)
    assert checkpoints.newest_checkpoint(tmp_path) == newest


def test_a_checkpoint_of_an_earlier_version_is_told_and_not_lost(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "step-00000003"
    folder.mkdir(parents=True)
    (folder / "lightning.ckpt").write_bytes(b"weights")
    state = make_state(3, files={"lightning.ckpt": 7}).model_dump(exclude={"format", "checksums"})
    (folder / "state.json").write_text(json.dumps(state))
    assert checkpoints.set_damaged_aside(tmp_path) == []
    for ask, of in ((checkpoints.newest_checkpoint, tmp_path), (checkpoints.find_checkpoint, folder)):
        with pytest.raises(FormatError, match=r"made by an earlier version of llmt.*finish the run or export it with"):
            ask(of)
    save(tmp_path, 2)
    checkpoints.prune(tmp_path, 1)
    assert kept(tmp_path) == [3]


def save_on_ranks(run: Path, bad_rank: int | None) -> str:
    """Each rank writes a file; a bad one finds no room. Return the folder, or the error."""

    def write_own(folder: Path) -> list[Path]:
        return agreed(lambda: write_one(folder / f"rank-{own_rank()}"))

    def write_one(path: Path) -> list[Path]:
        if own_rank() == bad_rank:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        path.write_text(path.name)
        return [path]

    try:
        return str(checkpoints.save_checkpoint(run, make_state(1), {"config.yaml": CONFIG}, write_own))
    except OSError as error:
        return str(error) if durable.is_full_disk(error) else "another error"


def test_all_ranks_write_into_one_folder_and_the_first_one_describes_it(tmp_path: Path) -> None:
    first, second = on_ranks(2, save_on_ranks, tmp_path, None)
    assert first == second == str(tmp_path / "checkpoints" / "step-00000001")
    checkpoints.check_undamaged(Path(first))
    assert {"rank-0", "rank-1", "config.yaml"} <= checkpoints.read_state(Path(first)).files.keys()


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_a_rank_without_room_stops_all_and_leaves_nothing(tmp_path: Path, bad_rank: int) -> None:
    first, second = on_ranks(2, save_on_ranks, tmp_path, bad_rank)
    assert first == second
    assert f"No space left on device (rank {bad_rank} on " in first
    assert list((tmp_path / "checkpoints").iterdir()) == []


def set_aside_on_ranks(run: Path) -> tuple[list[str], str]:
    return checkpoints.set_damaged_aside(run), str(checkpoints.newest_checkpoint(run))


def test_ranks_share_the_search_for_damage_and_agree(tmp_path: Path) -> None:
    older, newest = save(tmp_path, 1), save(tmp_path, 2)
    flip(newest / WEIGHTS)
    first, second = on_ranks(2, set_aside_on_ranks, tmp_path)
    assert first == second
    assert len(first[0]) == 1
    assert first[1] == str(older)
