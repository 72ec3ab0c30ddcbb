"""What was measured in this run, on this machine: all that a forecast multiplies."""

import subprocess
import sys
import time

from llmt_prep.simulation.pack_trial import PackTrial
from llmt_prep.simulation.replica import PlanRates
from llmt_prep.simulation.tokenize_trial import TokenizeTrial
from llmt_shared.config import StrictModel

_IMPORTS = "import llmt_prep.cli, llmt_prep.pipeline"


class Rates(StrictModel):
    """Rates of one core while others work too, and seconds and bytes of what is done for each unit, file or run."""

    workers: int
    """Processes that worked at once."""
    engine: str
    itemsize: int
    """Bytes of a token."""
    read: float
    """Bytes a second of input, from wherever it was; for comparison with the `disk` that is asked about."""
    hash: float
    """Bytes of input a second."""
    tokenize: dict[str, float]
    """Bytes of input a second, by source."""
    gather: float
    """Tokens a second."""
    plan: float
    """Seconds for each document of the corpus, of the coordinator alone."""
    join: float
    """Bytes of side-cars a second, of the coordinator alone."""
    process_start: float
    """Seconds until a run begins, its tokenizer loaded."""
    list_file: float
    """Seconds for each file to be found."""
    choose: float
    """Seconds until the engine is chosen."""
    hash_start: float
    """Seconds until workers hash."""
    tokenize_start: float
    """Seconds until workers tokenize at full speed."""
    tokenize_start_alone: float
    """The same where there is one worker, which is the coordinator."""
    gather_start: float
    gather_start_alone: float
    finish: float
    """Seconds that a run takes to write what is not tokens."""
    unit_tokenize: float
    """Seconds of the coordinator for each unit that is tokenized."""
    unit_finish: float
    """Seconds of the coordinator for each unit, in the end."""
    tokenizer: float
    """Bytes of the tokenizer in the cache, for workers to load."""
    companions: float
    """Bytes of tokenizer, mix, ledger and metadata in the dataset."""
    manifest_entry: float
    """Bytes for each file of the dataset."""
    quarantine_line: float
    """Bytes for each bad record."""
    plan_peak: float
    """Bytes of resident memory while planning."""
    tokenize_peak: float
    gather_peak: float
    unit_memory: float
    """Bytes for each unit in the coordinator; other processes map a file of the list."""
    busy: dict[str, float]
    """Share of its time for which a worker had a processor, by stage: where it is low, others or disks held it up."""


def measured_rates(
    names: list[str],
    tokenized: TokenizeTrial,
    packed: PackTrial,
    planned: PlanRates,
    join: float,
    itemsize: int,
    process_start: float,
    list_file: float,
) -> Rates:
    """Put together what the trials found.

    Args:
        names: of the sources.
        tokenized: hashing and tokenizing the sample.
        packed: gathering it.
        planned: planning a made-up corpus.
        join: bytes of side-cars a second.
        itemsize: bytes of a token.
        process_start: seconds.
        list_file: seconds for each file.
    """
    hashing, tokenizing, gathering = tokenized.hashing, tokenized.tokenizing, packed.gathering
    size = sum(source.bytes for source in tokenized.sources)
    return Rates(
        workers=tokenizing.workers,
        engine=tokenized.engine,
        itemsize=itemsize,
        read=tokenized.read_rate,
        hash=size / sum(source.hash_seconds for source in tokenized.sources),
        tokenize={
            name: source.bytes / source.tokenize_seconds for name, source in zip(names, tokenized.sources, strict=True)
        },
        gather=packed.places / gathering.seconds,
        plan=planned.plan_seconds,
        join=join,
        process_start=process_start,
        list_file=list_file,
        choose=tokenized.choose_seconds,
        hash_start=hashing.spawning,
        tokenize_start=tokenizing.startup,
        tokenize_start_alone=tokenizing.warming,
        gather_start=gathering.startup,
        gather_start_alone=gathering.warming,
        finish=packed.finish_seconds,
        unit_tokenize=planned.tokenize_seconds,
        unit_finish=planned.finish_seconds,
        tokenizer=tokenized.tokenizer_bytes,
        companions=packed.companions,
        manifest_entry=packed.manifest_entry,
        quarantine_line=packed.quarantine_line,
        plan_peak=planned.peak,
        tokenize_peak=tokenizing.peak,
        gather_peak=gathering.peak,
        unit_memory=planned.unit_memory,
        busy={"hash": hashing.cpu_share, "tokenize": tokenizing.cpu_share, "gather": gathering.cpu_share},
    )


def seconds_to_import() -> float:
    """Return the seconds from starting a process until it could begin to pack."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", _IMPORTS], check=True)
    return time.monotonic() - started
