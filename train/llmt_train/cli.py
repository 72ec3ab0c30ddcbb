"""`llmt-train`: train on a packed dataset, export to Hugging Face. Heavy imports live inside the commands."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from llmt_shared.command import run
from llmt_train.parallel.started import end_at_once, how_started, told_once_a_machine

app = typer.Typer(
    name="llmt-train",
    help="Stage two of llmt: train on packed shards, export to Hugging Face.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="`--traceback` on any command shows where an error comes from.",
)

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
Force = Annotated[bool, typer.Option("--force", help="Remove what is there from an earlier call and start over.")]


def main() -> None:
    """Console script."""
    try:
        run(app, extra="train")
    except BaseException as error:
        end_at_once(error)
        raise


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"llmt {version('llmt')}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """What every command takes."""


@app.command()
def fit(
    config: Annotated[Path, typer.Option(help="Run file; `llmt-train schema` says what it may hold.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Settings that win over the file's.")
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Train; running the same command again resumes from the newest checkpoint.

    Examples:

        llmt-train fit --config configs/train/pretrain.yaml

        llmt-train fit --config run.yaml optim.lr=3e-4 train.steps=50
    """
    from llmt_shared.config import load_config
    from llmt_train.config import RunConfig

    with told_once_a_machine():
        settings = load_config(config, RunConfig, overrides or [])  # a typing mistake must not wait for torch
        started = how_started()
    from dataclasses import asdict

    from llmt_train.parallel.launch import end_with_launcher, launched

    if launched(settings):
        return
    end_with_launcher()
    from llmt_train.fit import fit as fit_run

    result = fit_run(settings, force=force)
    if started is not None and started.rank > 0:
        return  # rank 0 prints the result
    if as_json:
        typer.echo(json.dumps(asdict(result)))
        return
    held_out = "" if result.eval_loss is None else f", held out {result.eval_loss:.4f}"
    losses = ("loss unknown (no metrics.jsonl)" if result.loss is None else f"loss {result.loss:.4f}") + held_out
    best = "" if result.best is None else f"; best held out {result.best_eval_loss:.4f} -> {result.best}"
    typer.echo(f"{result.steps} steps, {result.tokens:,} tokens: {losses} -> {result.checkpoint}{best}")


@app.command()
def check(
    config: Annotated[Path, typer.Option(help="Run file; `llmt-train schema` says what it may hold.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Settings that win over the file's.")
    ] = None,
    on: Annotated[
        str | None, typer.Option(help="GPU that is to train it, such as H100 or `A100 40GB`; else this machine.")
    ] = None,
    devices: Annotated[
        int | None,
        typer.Option(min=1, help="How many devices are to train it; else what `parallel` or this machine says."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say whether a run would begin, and what memory and time it needs; loads no weights and needs no GPU.

    All problems are reported at once.

    Examples:

        llmt-train check --config run.yaml

        llmt-train check --config run.yaml --on H100 --devices 8 batch.micro_rows=4
    """
    from llmt_shared.config import load_config
    from llmt_train.config import RunConfig

    settings = load_config(config, RunConfig, overrides or [])  # a typing mistake must not wait for torch
    from llmt_train.check.check import check as check_run
    from llmt_train.check.preflight import raise_problems
    from llmt_train.check.report import as_data, as_text

    report = check_run(settings, on, devices)
    typer.echo(json.dumps(as_data(report)) if as_json else as_text(report))
    raise_problems(report.problems)


@app.command()
def ref(
    config: Annotated[Path, typer.Option(help="Run file of task dpo: its data, and its model as the reference.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Settings that win over the file's.")
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Compute the reference log-probs of all pairs once, for `dpo.reference: precomputed`.

    They lie beside the dataset, in a folder that is named by the weights. Running the same command again goes on where
    it was stopped.

    Example:

        llmt-train ref --config run.yaml batch.micro_rows=8
    """
    from llmt_shared.config import load_config
    from llmt_train.config import RunConfig

    settings = load_config(config, RunConfig, overrides or [])  # a typing mistake must not wait for torch
    from dataclasses import asdict

    from llmt_train.precompute import precompute

    result = precompute(settings, force=force)
    if as_json:
        typer.echo(json.dumps(asdict(result)))
        return
    typer.echo(f"{result.pairs:,} pairs, {result.computed:,} computed now -> {result.directory}")


@app.command()
def validate(
    checkpoint: Annotated[
        Path, typer.Argument(help="Output folder of a run (its newest checkpoint), or one checkpoint.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Settings that win over the run's.")
    ] = None,
    split: Annotated[str, typer.Option(help="train or validation.")] = "validation",
    as_json: AsJson = False,
) -> None:
    """Evaluate a checkpoint: every measure over a split of its dataset or of another one, in total and by source.

    Examples:

        llmt-train validate runs/pt

        llmt-train validate runs/sft/checkpoints/step-00000500 data=data/other batch.micro_rows=8 --json
    """
    from dataclasses import asdict

    from llmt_train.validate import table
    from llmt_train.validate import validate as validate_checkpoint

    result = validate_checkpoint(checkpoint, overrides or [], split=split)
    typer.echo(json.dumps(asdict(result)) if as_json else table(result))


@app.command()
def export(
    checkpoint: Annotated[
        Path, typer.Argument(help="Output folder of a run (its newest checkpoint), or one checkpoint.")
    ],
    directory: Annotated[Path, typer.Argument(help="Folder to write; must be new or empty.")],
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Write a run's adapters alone, for peft; without this they are merged.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Load the result with plain transformers and compare its logits with ours.")
    ] = False,
    max_shard: Annotated[str, typer.Option(help="Largest size of one file of weights, such as 500MB.")] = "5GB",
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint as a Hugging Face model: safetensors, config, tokenizer and chat template.

    The weights are copied one tensor after the other, so a model may be larger than memory (not with --check).

    Example:

        llmt-train export runs/pt exported/pt --check
    """
    from llmt_shared.config import parse_bytes
    from llmt_shared.errors import ConfigError

    try:
        size = parse_bytes(max_shard)
    except ValueError as error:
        raise ConfigError(f"--max-shard: {error}") from None
    from dataclasses import asdict

    from llmt_train.export import export as export_model

    result = export_model(checkpoint, directory, adapter=adapter, check=check, force=force, max_shard=size)
    if as_json:
        typer.echo(json.dumps(asdict(result)))
        return
    checked = "" if result.largest_difference is None else f", logits differ by at most {result.largest_difference:.2e}"
    typer.echo(f"{result.checkpoint}: {result.bytes:,} bytes of weights{checked} -> {result.directory}")


@app.command()
def schema() -> None:
    """Print the JSON schema of run.yaml."""
    from llmt_train.config import RunConfig

    json.dump(RunConfig.model_json_schema(), sys.stdout, indent=2)
    typer.echo()


if __name__ == "__main__":
    main()
