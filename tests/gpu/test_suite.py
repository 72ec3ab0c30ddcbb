"""The GPU suite on a CPU: every part runs, finds what is wrong, and never passes what is not there."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from gpu import attention_part, suite
from gpu.attention_part import CASES, definition
from gpu.exact import FACTOR, compare
from gpu.fits import SIZES, check_losses, check_same_start, speed_of
from gpu.record import ABSENT, FAILED, OK, AbsentError, Report, WrongError, read_cases
from gpu.runner import failed, run_parts
from gpu.table import render

from llmt_train.attention import Segments
from llmt_train.attention.sdpa import sdpa

pytestmark = pytest.mark.filterwarnings("default")  # parts are processes of their own, where a warning is a line

# What a CPU has not, by part; every other case must be ok.
LACKING = {"flash3", "flash2", "varlen", "flex", "liger"}


@pytest.mark.parametrize("part", suite.PARTS)
def test_every_part_runs_on_a_cpu(part, tmp_path):
    suite.run_part(part, "dry", tmp_path / "cases")
    cases = read_cases(tmp_path / "cases")
    assert {case["case"] for case in cases if case["status"] == FAILED} == set()
    assert any(case["status"] == OK for case in cases)
    for case in cases:
        if case["status"] == ABSENT:
            assert any(word in case["case"] for word in LACKING), case
            assert case["reason"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("part", [part for part in suite.PARTS if part != "device"])
def test_without_a_gpu_a_part_is_absent(part, tmp_path):
    suite.run_part(part, "quick", tmp_path / "cases")
    (case,) = read_cases(tmp_path / "cases")
    assert (case["status"], case["reason"]) == (ABSENT, "no CUDA device")


def attention(dtype, case, segments):
    inputs, _ = attention_part._inputs(case, segments, torch.bfloat16, "cpu")
    return [definition(*(x.detach().to(dtype) for x in inputs), segments, case, None)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"window": 15},
        {"window": 17},
        {"window": None},
        {"softcap": 5.0},
    ],
)
def test_a_wrong_option_is_found(wrong):
    segments, case = Segments.from_lengths([1, 40, 60, 27]), CASES[1]._replace(window=16)
    plain, truth = attention(torch.bfloat16, case, segments), attention(torch.float64, case, segments)
    compare(plain, plain, truth, {})
    with pytest.raises(WrongError, match=f"allowed {FACTOR}"):
        compare(attention(torch.bfloat16, case._replace(**wrong), segments), plain, truth, {})


def test_one_wrong_token_is_found():
    segments = Segments.from_lengths([1, 40, 60, 27])
    plain, truth = (attention(dtype, CASES[1], segments) for dtype in (torch.bfloat16, torch.float64))
    found = plain[0].clone()
    found[70] *= 1.1
    with pytest.raises(WrongError):
        compare([found], plain, truth, {})


def test_what_is_not_finite_is_found():
    truth = [torch.ones(3, 2, dtype=torch.float64)]
    with pytest.raises(WrongError):
        compare([torch.full((3, 2), math.nan)], [torch.ones(3, 2)], truth, {})


def test_a_leak_between_segments_is_found():
    def leaking(q, k, v, segments, options):
        return sdpa(q, k, v, Segments.from_lengths([q.shape[0]]), options)

    attention_part._check_isolation(sdpa, "cpu", attention_part.SIZES["dry"])
    with pytest.raises(WrongError, match="sees others"):
        attention_part._check_isolation(leaking, "cpu", attention_part.SIZES["dry"])


def test_losses_must_fall_and_be_finite():
    check_losses([3.0, 2.5, 2.0, 1.5])
    for losses in ([3.0, 3.0, 2.95, 3.0], [3.0, 2.0, math.nan, 1.0]):
        with pytest.raises(WrongError):
            check_losses(losses)


def test_runs_that_begin_apart_are_found(tmp_path):
    def step(loss, norm):
        return [{"loss": loss, "grad_norm": norm}]

    report = Report(tmp_path / "cases")
    check_same_start(report, {"a": step(3.0, 1.0), "b": step(3.0, 1.0005), "failed": []}, 1e-3)
    check_same_start(report, {"a": step(3.0, 1.0), "b": step(3.0, 1.01)}, 1e-3)
    assert [case["status"] for case in read_cases(tmp_path / "cases")] == [OK, FAILED]


def test_speed_counts_tokens_of_documents():
    record = {"tokens_per_s": 100.0, "fill": 0.5, "mfu": 0.4, "peak_memory": 2 * 10**9, "data_wait": 0.0}
    assert speed_of([record]) == {"tokens/s": 50.0, "mfu": 0.4, "peak GB": 2.0, "data wait": 0.0}


def test_a_case_says_what_became_of_it(tmp_path):
    report = Report(tmp_path / "cases")
    with report.case("good") as values:
        values["ms"] = 1.5
    with report.case("bad"):
        raise ValueError("off by 3")
    with report.case("missing"):
        raise AbsentError("no such kernel")
    found = [(case["case"], case["status"], case["reason"]) for case in read_cases(tmp_path / "cases")]
    assert found == [("good", OK, ""), ("bad", FAILED, "ValueError: off by 3"), ("missing", ABSENT, "no such kernel")]


def line(status: str) -> str:
    return json.dumps({"case": "a", "status": status, "values": {"ms": 2.0}, "reason": "why"})


PROGRAMS = {
    "good": f"write('{line(OK)}')",
    "wrong": f"write('{line(FAILED)}')",
    "missing": f"write('{line(ABSENT)}')",
    "silent": "pass",
    "broken": f"write('{line(OK)}'); raise SystemExit('segmentation fault')",
    "hanging": f"write('{line(OK)}'); import time; time.sleep(60)",
}


def program(name: str, cases: Path) -> list[str]:
    code = f"def write(line): print(line, file=open({str(cases)!r}, 'a'))\n{PROGRAMS[name]}"
    return [sys.executable, "-S", "-c", code]


def test_parts_end_as_they_should(tmp_path):
    begin = time.monotonic()
    found = run_parts(dict.fromkeys(PROGRAMS, 3.0), program, tmp_path / "out.json", {"profile": "test"}, 60)
    assert time.monotonic() - begin < 30
    statuses = {name: part["status"] for name, part in found["parts"].items()}
    assert statuses == {
        "good": OK, "wrong": FAILED, "missing": ABSENT, "silent": FAILED, "broken": FAILED, "hanging": FAILED,
    }  # fmt: skip
    assert found["parts"]["hanging"]["reason"] == "stopped at its limit of 3 s"
    assert len(found["parts"]["hanging"]["cases"]) == 1  # what it wrote stays
    assert found["parts"]["broken"]["last lines"][-1] == "segmentation fault"
    assert failed(found) == ["wrong", "silent", "broken", "hanging"]
    assert json.loads((tmp_path / "out.json").read_text()) == found
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.log"]


def test_what_the_budget_leaves_no_time_for_has_failed(tmp_path):
    found = run_parts({"hanging": 60.0, "good": 60.0}, program, tmp_path / "out.json", {}, 1.0)
    assert failed(found) == ["hanging", "good"]
    assert found["parts"]["good"]["reason"] == "not run: the budget of 1 s is spent"


def test_the_table_tells_every_part_and_case(tmp_path):
    lines = render(run_parts({"good": 9.0, "missing": 9.0}, program, tmp_path / "out.json", {}, 60)).splitlines()
    assert [text.split()[:2] for text in lines] == [["good", OK], ["a", OK], ["missing", ABSENT], ["a", ABSENT]]
    assert "ms 2" in lines[1]
    assert "why" in lines[3]


def test_the_exit_code_says_whether_anything_failed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(suite, "_command", lambda profile: lambda name, cases: program(names[name], cases))
    for name, code in {"good": 0, "missing": 0, "wrong": 1, "broken": 1}.items():
        names = {"device": name}
        assert suite.main(["--dry", "--parts", "device", "--out", str(tmp_path / "out.json")]) == code
    assert suite.main(["--parts", "device,fun"]) == 2
    assert "no part fun" in capsys.readouterr().err


def test_the_limits_are_those_that_are_promised():
    for limits in suite.PARTS.values():
        assert max(limits.quick, limits.full) <= 480
    assert suite.BUDGETS.full <= 1800
    assert suite.BUDGETS.quick <= 480
    assert set(SIZES) == set(suite.Limits._fields)


def test_the_script_says_what_it_does():
    script = Path(__file__).parents[2] / "scripts" / "gpu_suite.sh"
    environment = os.environ | {"PYTHON": sys.executable}
    shown = subprocess.run(["bash", script, "--help"], env=environment, capture_output=True, text=True, check=True)
    assert all(f"    {part}" in shown.stdout for part in suite.PARTS)
