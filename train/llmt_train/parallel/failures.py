"""Why a run on many ranks failed, in one message that names the rank, its machine and the reason.

A rank that dies or hangs makes the others fail too, with errors that say nothing of it: who only waited is innocent.
"""

import re
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from signal import Signals

from torch import distributed as dist

from llmt_shared.errors import ConfigError, FormatError, LlmtError, Stopped
from llmt_train.parallel.board import Beat, Board, Ending
from llmt_train.parallel.started import name_of

_PEERS = re.compile(r"gloo|NCCL|nccl|[Cc]onnection (closed|reset)|Broken pipe")
_KINDS = ("done", "told", "failed", "waiting")
_BY_CODE: tuple[type[LlmtError], ...] = (ConfigError, FormatError, Stopped)
_SHOWN_FRAMES = 3
_SHOWN_RANKS = 8
_RESUME = "; the same command resumes from the newest checkpoint"


class RankError(LlmtError):
    """A rank failed, and with it the run."""


@dataclass(frozen=True)
class Fate:
    """What is known of one rank when a run has failed."""

    rank: int
    host: str
    beat: Beat | None = None
    ending: Ending | None = None
    signal: int | None = None
    """What killed it; 0 for a rank of which nothing is heard any more."""

    @property
    def name(self) -> str:
        """What messages call it."""
        return name_of(self.rank, self.host)


def ending_of(error: BaseException | None, *, whole: bool = False) -> Ending:
    """Return what a rank tells the others about how it ends.

    Args:
        error: what ends it; ``None`` for a good end.
        whole: tell the whole traceback of an error that is nobody's message.
    """
    if error is None:
        return Ending("done", 0, "")
    if isinstance(error, LlmtError):
        return Ending("told", error.exit_code, str(error))
    lines = traceback.format_exception_only(error) + traceback.format_tb(error.__traceback__)[-_SHOWN_FRAMES:]
    text = "".join(traceback.format_exception(error) if whole else lines).strip()
    return Ending("waiting" if _is_of_peers(error) else "failed", 1, text)


def gather_fates(board: Board, hosts: dict[int, str], patience: float) -> list[Fate]:
    """Wait until every rank has said how it ends, or ``patience`` seconds; ranks without a sign of life are dead."""
    before = board.beats()
    board.wait_for("ending", range(board.world), patience)
    beats, endings = board.beats(), board.endings()
    return [
        Fate(
            rank,
            hosts.get(rank, "?"),
            beats.get(rank),
            endings.get(rank),
            None if rank in beats and beats[rank] != before.get(rank) else 0,
        )
        for rank in range(board.world)
    ]


def verdict(fates: Sequence[Fate], timeout: float) -> LlmtError:
    """Return what the user is told: of all that went wrong, what came first.

    Args:
        fates: of all ranks; one at least has not ended well.
        timeout: seconds that a rank waits for the others.
    """
    said = {kind: [fate for fate in fates if fate.ending is not None and fate.ending.kind == kind] for kind in _KINDS}
    silent = [fate for fate in fates if fate.ending is None]
    step = max((fate.beat.step or 0 for fate in fates if fate.beat is not None), default=0)
    aborted = [fate for fate in silent if fate.signal == Signals.SIGABRT]  # NCCL does so to a rank that waits too long
    reasons: list[tuple[list[Fate], Callable[[list[Fate]], LlmtError]]] = [
        ([fate for fate in said["told"] if not _is_stopped(fate)], lambda found: _as_told(found, len(fates))),
        (
            [fate for fate in silent if fate.signal is not None and fate not in aborted],
            lambda found: _as_killed(found, step),
        ),
        (said["failed"], lambda found: RankError(_alike(found, len(fates)))),
        (said["told"], lambda found: _as_told(found, len(fates))),
        ([fate for fate in silent if fate.signal is None], lambda found: _as_behind(found, timeout)),
        (aborted, lambda found: _as_killed(found, step)),
        (said["waiting"], _as_waiting),
    ]
    return next(describe(found) for found, describe in reasons if found)


def late(beats: dict[int, Beat], hosts: dict[int, str]) -> str | None:
    """Say which ranks keep the others waiting, as far as signs of life tell: fewer steps done, or still moving."""
    fewest = min((beat.step or 0 for beat in beats.values()), default=0)
    slow = [rank for rank, beat in beats.items() if (beat.step or 0) == fewest]
    if len(slow) == len(beats):
        places = [beat.place for beat in beats.values()]
        usual = max(places, key=places.count)
        slow = [rank for rank, beat in beats.items() if beat.place != usual]
    silent = [name_of(rank, hosts.get(rank, "?")) for rank in hosts if rank not in beats]
    parts = [f"{name_of(rank, hosts.get(rank, '?'))} is at {beats[rank].place}" for rank in slow[:_SHOWN_RANKS]]
    return "; ".join([f"no sign of life of {', '.join(silent[:_SHOWN_RANKS])}"] * bool(silent) + parts) or None


def _is_of_peers(error: BaseException | None) -> bool:
    """Whether an error says only that others did not answer."""
    if error is None:
        return False
    says_so = isinstance(error, RuntimeError) and _PEERS.search(str(error)) is not None
    return isinstance(error, dist.DistError) or says_so or _is_of_peers(error.__cause__)


def _as_told(fates: Sequence[Fate], world: int) -> LlmtError:
    """The ranks' own message, as the class that has its exit code."""
    first = next(fate.ending for fate in fates if fate.ending is not None)
    text = first.text if len(fates) == world and _is_one(fates) else _alike(fates, world)
    return next((kind for kind in _BY_CODE if kind.exit_code == first.code), RankError)(text)


def _is_stopped(fate: Fate) -> bool:
    return fate.ending is not None and fate.ending.code == Stopped.exit_code


def _is_one(fates: Sequence[Fate]) -> bool:
    return len({fate.ending.text for fate in fates if fate.ending is not None}) == 1


def _alike(fates: Sequence[Fate], world: int) -> str:
    """The texts of some ranks, each once with the names of all that have it."""
    ranks: dict[str, list[Fate]] = {}
    for fate in fates:
        ranks.setdefault(fate.ending.text if fate.ending is not None else "", []).append(fate)
    return "\n".join(
        f"{'all ranks' if len(same) == world > 1 else _names(same)}: {text}"
        for text, same in list(ranks.items())[:_SHOWN_RANKS]
    )


def _names(fates: Sequence[Fate]) -> str:
    more = f" and {len(fates) - _SHOWN_RANKS} more" if len(fates) > _SHOWN_RANKS else ""
    return ", ".join(fate.name for fate in fates[:_SHOWN_RANKS]) + more


def _each(fates: Iterable[Fate], describe: Callable[[Fate], str]) -> str:
    shown = list(fates)
    more = [f"and {len(shown) - _SHOWN_RANKS} more"] if len(shown) > _SHOWN_RANKS else []
    return "\n".join([f"{fate.name} {describe(fate)}" for fate in shown[:_SHOWN_RANKS]] + more)


def _as_killed(fates: Sequence[Fate], step: int) -> LlmtError:
    """Who is killed cannot say where: the step is the last one that any rank knows of."""
    return RankError(_each(fates, lambda fate: _how_killed(fate, step)) + _RESUME)


def _how_killed(fate: Fate, step: int) -> str:
    when = f" after step {step}" if step else ""
    if not fate.signal:
        return f"gives no sign of life{when}: it was killed, hangs, or its machine is down"
    reason = ": perhaps memory ran out" if fate.signal == Signals.SIGKILL else ""
    return f"was killed by {Signals(fate.signal).name}{when}{reason}"


def _as_behind(fates: Sequence[Fate], timeout: float) -> LlmtError:
    return RankError(_each(fates, lambda fate: _how_behind(fate, timeout)) + _RESUME)


def _how_behind(fate: Fate, timeout: float) -> str:
    where = f"; it has been at {fate.beat.place} for {fate.beat.still:.0f} s" if fate.beat is not None else ""
    return f"is behind{_when(fate)}: the others gave up waiting (parallel.timeout: {timeout:g} s){where}"


def _as_waiting(fates: Sequence[Fate]) -> LlmtError:
    return RankError(f"all ranks waited for each other{_RESUME}\n{_each(fates, _how_waiting)}")


def _how_waiting(fate: Fate) -> str:
    return f"waited{_when(fate)}: {fate.ending.text if fate.ending is not None else ''}"


def _when(fate: Fate) -> str:
    return "" if fate.beat is None or fate.beat.step is None else f" after step {fate.beat.step}"
