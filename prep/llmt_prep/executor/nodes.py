"""The machines of a cluster: which have room for a task, whether they can do the work, and what a worker there does."""

import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from llmt_prep.executor.worker import Task, outcome, use_one_thread
from llmt_shared import __version__
from llmt_shared.errors import ConfigError


class Node(NamedTuple):
    """A machine, or a part of one, on which tasks can run."""

    id: str
    host: str
    address: str
    cpus: int
    slots: int
    """Tasks that it has room for at a time; at least 1."""


class Facts(NamedTuple):
    """What a worker finds on its machine; of plain types, for it may have no llmt to read others with."""

    host: str
    python: str
    """As in 3.11."""
    llmt: str | None
    """Its version; nothing where it is not installed."""
    marks: dict[str, bytes]
    """What it reads in the files that this machine has written; without those that it does not see."""
    missing: list[str]
    """Input that it does not see."""


class Terms(NamedTuple):
    """Under which a worker does as this process would."""

    llmt: str
    python: str
    folder: str
    """Where relative paths start."""
    umask: int
    marks: tuple[tuple[str, bytes], ...]
    """Files that this process has written, by their absolute paths, and what they began with then."""


def terms_of_this_process(marks: Iterable[Path]) -> Terms:
    """Return the terms, with the marks as they are now."""
    umask = os.umask(0)
    os.umask(umask)  # there is no other way to ask
    contents = tuple((str(path.absolute()), path.read_bytes()) for path in marks)
    python = ".".join(platform.python_version_tuple()[:2])
    return Terms(__version__, python, os.getcwd(), umask, contents)


def usable_nodes(described: Iterable[Mapping[str, Any]], memory: int) -> list[Node]:
    """Return the nodes with room for a task that declares a CPU and so many bytes, of what `ray.nodes` says."""
    nodes = []
    for each in described:
        cpus, bytes_ = (each["Resources"].get(key, 0) for key in ("CPU", "memory"))
        slots = int(min(cpus, bytes_ // memory if memory else cpus))
        if each["Alive"] and slots:
            nodes.append(
                Node(each["NodeID"], each["NodeManagerHostname"], each["NodeManagerAddress"], int(cpus), slots)
            )
    return nodes


def check_facts(facts: Facts, terms: Terms) -> None:
    """Raise ConfigError where a worker's machine cannot do as this process would."""
    node = f"node {facts.host}"
    if (facts.llmt, facts.python) != (terms.llmt, terms.python):
        found = "no llmt" if facts.llmt is None else f"llmt {facts.llmt}"
        raise ConfigError(
            f"{node}: has {found} for Python {facts.python}; wanted llmt {terms.llmt} for Python {terms.python}, as "
            f"here: install the same on all nodes, in the Python that runs Ray there"
        )
    for path, content in terms.marks:
        if not facts.marks.get(path, b"").startswith(content):
            raise ConfigError(
                f"{node}: {path}: what this machine has written there is not seen; `cache` and `output` must lie on a "
                f"file system that all nodes share, under the same path"
            )
    for path in facts.missing:
        raise ConfigError(
            f"{node}: {path}: is not there; sources must lie where all nodes see them under the same path"
        )


def examining() -> Callable[[Sequence[str], Sequence[str]], tuple[Any, ...]]:
    """Return a function that a worker without llmt can run, for it is sent by value; see `Facts` for what it gives."""

    def examine(marks: Sequence[str], inputs: Sequence[str]) -> tuple[Any, ...]:
        import os
        import platform

        try:
            from llmt_shared import __version__ as llmt
        except ImportError:
            llmt = None  # type: ignore[assignment]
        seen = {}
        for path in marks:
            try:
                with open(path, "rb") as file:
                    seen[path] = file.read()
            except OSError:
                pass
        missing = [path for path in inputs if not os.path.exists(path)]
        python = ".".join(platform.python_version_tuple()[:2])
        return platform.node(), python, llmt, seen, missing

    return examine


def serve(terms: Terms, function: Callable[..., Any], task: Task) -> tuple[Any, Exception | None]:
    """Run a task in a worker of the cluster."""
    problem = _settle(terms)
    return (None, problem) if problem else outcome(function, task)


@cache
def _settle(terms: Terms) -> ConfigError | None:
    """Make a worker's process like the one that gives the tasks, once; returns why that cannot be.

    A node that joins in the middle of a run, which nobody has asked before, is found here.
    """
    try:
        check_facts(Facts(*examining()([path for path, _ in terms.marks], ())), terms)
    except ConfigError as error:
        return error
    use_one_thread()
    os.umask(terms.umask)
    if os.path.isdir(terms.folder):  # else nothing lies there, and no relative path leads anywhere
        os.chdir(terms.folder)
    return None
