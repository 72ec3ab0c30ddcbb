"""Tasks on a Ray cluster: one that runs already, or one that is started for the run. Only this module imports Ray.

Ray places tasks by the CPU and the memory that each declares; how many are handed to it, which are done again and how
they end is ours (`dispatch`), so that all that is seen of Ray are its nodes' names.
"""

import atexit
import logging
import os
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain, islice
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NoReturn

import ray
from ray import exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from llmt_prep.executor.address import HERE, address_of
from llmt_prep.executor.dispatch import Ended, Lost, dispatch
from llmt_prep.executor.local import usable_cpus
from llmt_prep.executor.nodes import (
    Facts,
    Node,
    Terms,
    check_facts,
    examining,
    serve,
    terms_of_this_process,
    usable_nodes,
)
from llmt_prep.executor.worker import Task
from llmt_prep.report import count, size
from llmt_shared.errors import ConfigError, LlmtError, Stopped
from llmt_shared.progress import say

_OBJECT_STORE = 100_000_000
"""Bytes of shared memory for results, which are small; Ray wants no less."""
_WAIT = 60.0
"""Seconds for a node with room to come, where there is none."""
_SECONDS_BETWEEN_LOOKS = 5.0
_SILENCE = 30.0
"""Seconds without an answer of the cluster's head after which it is gone; Ray ends this process after 60."""
_GRACE = 5.0
"""Seconds to leave a cluster that is gone."""
_WAY_OUT = "nothing is lost: run the same command again to go on when it is there again"
_OWN_NODE_GONE = f"the Ray node of this machine is gone; {_WAY_OUT}"
_LOSSES = {
    exceptions.OutOfMemoryError: "a machine was out of memory",
    exceptions.NodeDiedError: "a node of the cluster was lost",
    exceptions.ObjectLostError: "a node of the cluster was lost",
    exceptions.WorkerCrashedError: "a worker process was lost",
    exceptions.TaskCancelledError: "a worker was told by others to stop",
}


class Cluster:
    """An executor, as the room's contract says; it is joined when a task is first to run."""

    def __init__(
        self, address: str | None, memory: int, workers: int | None, marks: tuple[Path, ...], inputs: tuple[Path, ...]
    ) -> None:
        """See `opened` of the room for the arguments."""
        self._said, self._memory, self._most = address, memory, workers
        self._marks, self._inputs = marks, inputs
        self._nodes: list[Node] = []
        self._is_joined = self._is_ours = self._is_gone = False
        self._seen = self._roomy = 0.0
        """On the monotonic clock: when the head last answered, and when there was last a node with room."""
        self._left = threading.Event()
        self._watching = threading.Thread(target=self._watch, daemon=True)

    @property
    def workers(self) -> int:
        """Tasks that run at a time."""
        self._join()
        slots = sum(node.slots for node in self._nodes)
        return min(slots, self._most or slots)

    @property
    def hosts(self) -> int:
        """Machines on which they run."""
        self._join()
        return len({node.host for node in self._nodes})

    def run(self, function: Callable[..., Any], tasks: Iterable[Task]) -> Iterator[tuple[int, Any]]:
        """Run tasks, as the room's contract says; a single one runs here."""
        waiting = iter(tasks)
        first = list(islice(waiting, 2))
        if len(first) < 2:
            yield from ((index, function(*task)) for index, task in enumerate(first))
            return
        self._join()
        yield from dispatch(self, function, chain(first, waiting))

    def report(self) -> dict[str, object]:
        """What run.json says of it."""
        if not self._is_joined:
            return {"executor": "ray", "workers": 1, "nodes": 0, "cpus": 0}  # there was nothing to do for it
        cpus = sum(node.cpus for node in self._nodes)
        return {"executor": "ray", "workers": self.workers, "nodes": len(self._nodes), "cpus": cpus}

    def leave(self, error: BaseException | None) -> None:
        """Leave the cluster; one that was started for this run ends.

        Args:
            error: what ends the run, where one does.
        """
        self._left.set()
        if not self._is_ours:
            return
        leaving = threading.Thread(target=ray.shutdown, daemon=True)  # it may wait for a head that hangs, for ever
        leaving.start()
        leaving.join(_GRACE if self._is_gone else _SILENCE)
        if self._is_joined:
            self._watching.join(_GRACE)
        if leaving.is_alive() or self._watching.is_alive():  # a thread within Ray ends the interpreter by a fault
            atexit.register(_end_at_once, getattr(error, "exit_code", Stopped.exit_code) if error else 0)

    # What `dispatch` asks for.

    def room(self) -> int:
        """Tasks to hand over: those that run at a time, and a few that wait so that none of the CPUs does."""
        slots = sum(node.slots for node in self._nodes)
        waiting = max(2, slots // 8) if slots else 0
        return min(slots + waiting, self._most or slots + waiting)

    def begin(self, function: Callable[..., Any], task: Task, tries: int, end: Callable[[Lost | Ended], None]) -> Any:
        """Hand a task over; one whose worker was lost goes to another node where there is one."""
        options = {"name": function.__name__, "scheduling_strategy": "DEFAULT" if tries == 1 else "SPREAD"}
        reference = self._remote.options(**options).remote(self._terms, function, task)
        reference.future().add_done_callback(lambda future: end(_end_of(future)))
        return reference

    def cancel(self, begun: Any, force: bool) -> None:
        """End a task, by KeyboardInterrupt in it or with its process."""
        if not self._is_gone:
            ray.cancel(begun, force=force)

    def look(self) -> None:
        """Raise Stopped where the cluster is not there any more, or no node with room has been for long."""
        now = time.monotonic()
        self._is_gone = self._is_gone or now - self._seen > _SILENCE
        if not self._has_own_node:
            raise Stopped(_OWN_NODE_GONE)
        if self._is_gone:
            raise Stopped(f"the Ray cluster at {self._head} does not answer any more; {_WAY_OUT}")
        if now - self._roomy > max(_WAIT, _SILENCE):
            raise Stopped(f"the Ray cluster at {self._head} has lost all nodes with room for a task; {_WAY_OUT}")

    def _watch(self) -> None:
        """See from time to time how large the cluster is; in a thread, for a head that hangs keeps whoever asks."""
        while not self._left.wait(_SECONDS_BETWEEN_LOOKS):
            with suppress(Exception):  # what does not answer, `look` reports
                described = ray.nodes()
                self._nodes = usable_nodes(described, self._memory)
                self._has_own_node = any(each["NodeID"] == self._own_node and each["Alive"] for each in described)
                self._is_gone = self._is_gone or not self._has_own_node
                self._seen = time.monotonic()
                self._roomy = self._seen if self._nodes else self._roomy

    def _join(self) -> None:
        """Join the cluster, once, and see that its nodes can do the work.

        Raises:
            ConfigError: it cannot be reached, has no room, or a node has another llmt or does not see the files.
        """
        if self._is_joined:
            return
        self._is_ours = not ray.is_initialized()  # else whoever calls us has joined one
        if self._is_ours:
            _begin_ray(address_of(self._said), self._most)
        self._head = ray.get_runtime_context().gcs_address
        self._own_node, self._has_own_node = ray.get_runtime_context().get_node_id(), True
        self._nodes = self._wait_for_nodes()
        self._terms = terms_of_this_process(self._marks)
        self._remote = ray.remote(num_cpus=1, memory=self._memory, max_retries=0)(serve)
        self._nodes = _checked(self._nodes, self._terms, self._inputs)
        self._seen = self._roomy = time.monotonic()
        self._is_joined = True
        self._watching.start()
        say(self._described())

    def _wait_for_nodes(self) -> list[Node]:
        deadline = time.monotonic() + _WAIT
        wanted = f"a CPU and {size(self._memory)} of memory for a task (`ray.memory`)"
        if not (nodes := usable_nodes(ray.nodes(), self._memory)):
            say(f"ray: no node has {wanted} yet; waiting {_WAIT:.0f} s for one to come")
        while not nodes:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"the Ray cluster at {self._head}: no node has {wanted}; start one that has, or set a smaller one"
                )
            time.sleep(1)
            nodes = usable_nodes(ray.nodes(), self._memory)
        return nodes

    def _described(self) -> str:
        cpus, nodes = sum(node.cpus for node in self._nodes), len(self._nodes)
        kind = "nodes" if nodes > 1 else "node"
        text = f"ray: {count(nodes)} {kind}, {count(cpus)} CPUs at {self._head}; {count(self.workers)} tasks at a time"
        if ray.available_resources().get("CPU", 0) < 1:
            text += "; others use all CPUs now, and the tasks wait for them"
        return text


def _begin_ray(address: str, workers: int | None) -> None:
    """Start or join a cluster, without Ray's own words on stdout and stderr."""
    alone: dict[str, Any] = {}
    if address == "local":
        alone = {
            "num_cpus": workers or usable_cpus(),
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE,
        }
    _silence_ray()
    try:
        wanted = None if address == HERE else address  # Ray finds it, and its token: one told by name must be told it
        _with_our_signals(partial(ray.init, wanted, logging_level=logging.ERROR, log_to_driver=False, **alone))
    except (OSError, RuntimeError, ValueError, exceptions.RayError) as error:
        raise ConfigError(
            f"ray.address: cannot join {address}: {_in_short(error)}; "
            f"where the cluster wants a token, set RAY_AUTH_MODE=token"
        ) from error


def _silence_ray() -> None:
    """Keep Ray from printing what becomes of nodes to stdout: what it means for the run, `dispatch` says."""
    module = ray._private.worker
    if hasattr(module, "print_to_stdstream"):  # not of its public names, but there is no other switch
        module.print_to_stdstream = lambda *_, **__: None


def _with_our_signals(start: Callable[[], object]) -> None:
    """Call what puts a handler of its own for SIGTERM, and put back ours."""
    if threading.current_thread() is not threading.main_thread():
        start()
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        start()
    except SystemExit:  # a SIGTERM while it started
        signal.signal(signal.SIGTERM, before)
        signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _checked(nodes: Sequence[Node], terms: Terms, inputs: Iterable[Path]) -> list[Node]:
    """Ask every node for its facts, before anything is done there; returns those that are still there.

    Raises:
        ConfigError: one cannot do the work, or does not answer.
    """
    examine = ray.remote(num_cpus=0, max_retries=0)(examining())
    marks, paths = [path for path, _ in terms.marks], [str(path.absolute()) for path in inputs]
    answers: SimpleQueue[tuple[Node, Any]] = SimpleQueue()
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node.id, soft=False)
        future = examine.options(scheduling_strategy=there).remote(marks, paths).future()
        future.add_done_callback(partial(lambda node, future: answers.put((node, future)), node))
    deadline, silent, there_still = time.monotonic() + _WAIT, {node.id: node for node in nodes}, []
    while silent:
        try:
            node, future = answers.get(timeout=max(0.0, deadline - time.monotonic()))
        except Empty:
            names = ", ".join(f"{node.host} ({node.address})" for node in silent.values())
            raise ConfigError(f"node {names}: no worker started there in {_WAIT:.0f} s; see Ray's logs there") from None
        del silent[node.id]
        error = future.exception()
        if error is None:
            check_facts(Facts(*future.result()), terms)
            there_still.append(node)
        elif not isinstance(error, (*_LOSSES, exceptions.TaskUnschedulableError)):
            raise ConfigError(f"node {node.host} ({node.address}): {_in_short(error)}")
    return there_still


def _end_at_once(code: int) -> NoReturn:
    """End, and wait for nobody."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _end_of(future: Any) -> Lost | Ended:
    """How a task ended, in our terms."""
    error = future.exception()
    if error is None:
        result, raised = future.result()
        return Lost("a worker process had no memory left") if isinstance(raised, MemoryError) else Ended(result, raised)
    for kind, how in _LOSSES.items():
        if isinstance(error, kind):
            return Lost(how)
    if isinstance(error, exceptions.LocalRayletDiedError):
        return Ended(None, Stopped(_OWN_NODE_GONE))
    return Ended(None, LlmtError(f"Ray could not run a task: {_in_short(error)}"))


def _in_short(error: BaseException) -> str:
    cause = getattr(error, "cause", None) or error  # of a RayTaskError, whose own text is a traceback
    return textwrap.shorten(str(cause) or type(cause).__name__, 400)
