"""Which nodes of a cluster have room, and which cannot do the work."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import small_tasks

from llmt_prep.executor import nodes
from llmt_prep.executor.nodes import Facts, check_facts, examining, serve, terms_of_this_process, usable_nodes
from llmt_shared.errors import ConfigError

GB = 1_000_000_000


def described(name: str, cpus: float, memory: float, alive: bool = True) -> dict[str, Any]:
    """A node as `ray.nodes` tells it."""
    resources = {key: value for key, value in {"CPU": cpus, "memory": memory}.items() if value}
    return {
        "NodeID": name, "NodeManagerHostname": f"host-{name}", "NodeManagerAddress": "10.0.0.1", "Alive": alive,
        "Resources": resources,
    }  # fmt: skip


def test_a_node_has_room_for_as_many_tasks_as_its_cpus_and_its_memory_serve() -> None:
    found = usable_nodes(
        [
            described("a", 8, 64 * GB), described("b", 8, 5 * GB), described("no cpu", 0, 64 * GB),
            described("no memory", 8, GB), described("dead", 8, 64 * GB, alive=False), described("half", 0.5, 9 * GB),
        ],
        2 * GB,
    )  # fmt: skip
    assert [(node.id, node.cpus, node.slots) for node in found] == [("a", 8, 8), ("b", 8, 2)]


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    path = tmp_path / "mark"
    path.write_text("written here")
    return path


def facts(mark: Path, inputs: list[Path] | None = None, **changes: Any) -> Facts:
    """What a worker of this very process finds."""
    return Facts(*examining()([str(mark)], list(map(str, inputs or []))))._replace(**changes)


def test_a_node_like_this_one_is_fine(mark: Path) -> None:
    check_facts(facts(mark, [mark.parent]), terms_of_this_process([mark]))


def test_a_file_that_grew_since_is_still_the_same(mark: Path) -> None:
    terms = terms_of_this_process([mark])
    mark.write_text("written here, and more by another run")
    check_facts(facts(mark), terms)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llmt": "9.9"}, r"^node far: has llmt 9\.9 for Python 3\.\d+; wanted llmt .* install the same on all nodes"),
        ({"llmt": None}, r"^node far: has no llmt for Python"),
        ({"python": "3.10"}, r"^node far: has llmt .* for Python 3\.10; wanted llmt .* for Python 3\.\d+, as here"),
        ({"marks": {}}, r"^node far: .*/mark: what this machine has written there is not seen; `cache` and `output`"),
        ({"missing": ["/raw/web"]}, r"^node far: /raw/web: is not there; sources must lie where all nodes see them"),
    ],
)
def test_a_node_that_cannot_do_the_work_is_named(mark: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_facts(facts(mark, host="far", **changes), terms_of_this_process([mark]))


def test_a_folder_of_the_same_name_on_another_disk_is_not_taken_for_the_shared_one(mark: Path) -> None:
    terms = terms_of_this_process([mark])
    mark.write_text("written elsewhere")
    with pytest.raises(ConfigError, match="is not seen"):
        check_facts(facts(mark), terms)


def test_a_source_that_a_node_does_not_see_is_found_missing(mark: Path) -> None:
    assert facts(mark, [mark, mark.parent / "none"]).missing == [str(mark.parent / "none")]


def test_the_examination_needs_no_llmt_on_the_node(mark: Path) -> None:
    cloudpickle = pytest.importorskip("ray.cloudpickle", reason="the extra `ray` is not installed")
    code = (
        "import sys, pickle, ray.cloudpickle\n"
        "sys.modules |= {'llmt_prep': None, 'llmt_shared': None}\n"  # no import of them succeeds
        f"print(pickle.loads({cloudpickle.dumps(examining())!r})([{str(mark)!r}], ['/none'])[2:])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found == f"(None, {{{str(mark)!r}: b'written here'}}, ['/none'])\n"


def test_a_worker_of_a_node_that_came_late_refuses_its_tasks(mark: Path) -> None:
    late = terms_of_this_process([mark])._replace(llmt="9.9")
    nodes._settle.cache_clear()
    result, error = serve(late, small_tasks.square, (3,))
    assert result is None
    assert isinstance(error, ConfigError)
    assert "wanted llmt 9.9" in str(error)
