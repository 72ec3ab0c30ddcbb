"""The command `llmt-prep`. A command reads its input, calls one function, prints one result.

Heavy imports live inside commands: `--help` must not wait for them.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from llmt_shared import command

app = typer.Typer(
    name="llmt-prep",
    help="Stage one of llmt: raw documents to packed, memory-mapped shards.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="`--traceback` on any command shows where an error comes from.",
)

cache_app = typer.Typer(
    help="List and prune the cache of tokenized input.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(cache_app, name="cache")

tokenizer_app = typer.Typer(help="Change a tokenizer.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(tokenizer_app, name="tokenizer")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Dataset = Annotated[
    str, typer.Argument(help="A finished dataset: the `output` of `pack`, a folder or URL.", show_default=False)
]
CacheFolder = Annotated[
    Path | None, typer.Argument(help="The `cache` of a mix; by default .llmt-cache beside its output.")
]
CacheOfMix = Annotated[Path | None, typer.Option("--mix", help="A mix file, whose cache it is.")]


def main() -> None:
    """Entry point of the console script."""
    command.run(app, extra="prep")


@app.command()
def pack(
    mix: Annotated[Path, typer.Option(help="Mix file (YAML).", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings that win over the file: key.sub=value.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    simulate: Annotated[
        str | None,
        typer.Option(
            metavar="KEY=VALUE,..",
            help="With --dry-run, which it implies: what a corpus of another size would take on other machines, from a "
            "measured sample. Keys: documents, bytes or tokens; machines, cores, disk, network; sample.",
            show_default=False,
        ),
    ] = None,
    explain_cache: Annotated[
        bool,
        typer.Option("--explain-cache", help="Print what the cache holds of it, and why not the rest; pack nothing."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a finished dataset.")] = False,
    rehash: Annotated[bool, typer.Option("--rehash", help="Hash all input again, even where nothing changed.")] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Tasks at a time; default: one for each CPU of the machine or cluster.")
    ] = None,
    executor: Annotated[str | None, typer.Option(help="Where tasks run: local or ray.", show_default=False)] = None,
    address: Annotated[
        str | None, typer.Option(help="Of the Ray cluster: HOST:PORT, auto or local.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Tokenize, sample and pack a mixture into shards. Run it again to go on after a stop.

    Examples:

        llmt-prep pack --mix configs/mix/pretrain.yaml --dry-run

        llmt-prep pack --mix mix.yaml --dry-run --simulate documents=1e10,machines=64,cores=32,disk=2GB/s

        llmt-prep pack --mix mix.yaml --explain-cache

        llmt-prep pack --mix mix.yaml budget=2B sequence.length=8192 --workers 16

        llmt-prep pack --mix mix.yaml --executor ray --address head:6379
    """
    from llmt_prep import explain as explanations
    from llmt_prep import plan as plans
    from llmt_prep.config import MixConfig
    from llmt_prep.pipeline import build_dataset, summary
    from llmt_prep.pipeline import dry_run as plan_dataset
    from llmt_prep.pipeline import explain_cache as explained
    from llmt_prep.report import as_json as to_json
    from llmt_prep.stopping import RESUME, START_AGAIN, stoppable
    from llmt_shared.config import load_config
    from llmt_shared.errors import ConfigError

    if (dry_run or simulate is not None) and explain_cache:
        raise ConfigError("--dry-run and --explain-cache answer different questions; give one of them")
    said = {"executor": executor, "ray.address": address}
    settings = [*(overrides or []), *(f"{key}={value}" for key, value in said.items() if value is not None)]
    if simulate is not None:
        typer.echo(_simulated(mix, settings, simulate, workers, as_json))
        return
    config = load_config(mix, MixConfig, settings)
    if address is not None and config.executor != "ray":
        raise ConfigError("--address is that of a Ray cluster; give --executor ray, too")
    with stoppable(START_AGAIN if dry_run or explain_cache else RESUME):
        if explain_cache:
            use = explained(config, workers=workers, rehash=rehash)
            typer.echo(to_json(use) if as_json else explanations.render(use))
            return
        if dry_run:
            plan = plan_dataset(config, workers=workers, rehash=rehash)
            typer.echo(plan.model_dump_json(indent=1) if as_json else plans.render(plan))
            return
        built = build_dataset(config, workers=workers, force=force, rehash=rehash)
    typer.echo(summary(built, as_json))


@app.command()
def stats(
    dataset: Dataset,
    html: Annotated[
        Path | None, typer.Option(help="Also write one page with plots, tables and sample rows.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what is in a dataset: sources, lengths, fill, repeated documents, the ledger.

    Examples:

        llmt-prep stats data/pt8k --json

        llmt-prep stats data/pt8k --html report.html
    """
    from llmt_prep.html import require_page, write_page
    from llmt_prep.report import as_json as to_json
    from llmt_prep.stats import dataset_stats, render
    from llmt_shared.dataset import open_dataset
    from llmt_shared.objects import named_location

    location = named_location(dataset)
    if html is not None:
        require_page(location, html)
    opened = open_dataset(location)
    result = dataset_stats(opened)
    if html is not None:
        write_page(opened, result, html)
    typer.echo(to_json(result) if as_json else render(result))


@app.command()
def inspect(
    dataset: Dataset,
    row: Annotated[int | None, typer.Option(min=0, help="Number of the row, from 0.", show_default=False)] = None,
    split: Annotated[str, typer.Option(help="train or validation.")] = "train",
    raw: Annotated[
        str | None,
        typer.Option(help="SOURCE:RECORD instead of a row: the raw record, its text, its tokens.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show one row decoded, or what became of one record: where it comes from, which tokens are targets.

    Examples:

        llmt-prep inspect data/pt8k --row 0

        llmt-prep inspect data/sft --raw chats:17
    """
    from llmt_prep import inspection
    from llmt_prep import raw as records
    from llmt_prep.report import as_json as to_json
    from llmt_prep.report import wants_colour
    from llmt_shared.dataset import open_dataset
    from llmt_shared.errors import ConfigError

    if (row is None) == (raw is None):
        raise ConfigError("inspect: wanted either --row N or --raw SOURCE:RECORD")
    opened, is_coloured = open_dataset(dataset), wants_colour(sys.stdout)
    if raw is not None:
        record = records.inspect_record(opened, raw)
        shown = to_json(record) if as_json else records.render(record, is_coloured)
    else:
        view = inspection.inspect_row(opened, split, row or 0)
        shown = to_json(view) if as_json else inspection.render(view, is_coloured)
    typer.echo(shown, color=True)  # `color` keeps click from stripping what FORCE_COLOR asks for


@app.command()
def verify(dataset: Dataset, as_json: Json = False) -> None:
    """Check a dataset in full: files, checksums, invariants, ledger, tokenizer. Exit code 3 when something is wrong.

    Example:

        llmt-prep verify data/pt8k
    """
    from llmt_prep.verify import as_text, find_problems, to_json
    from llmt_shared.objects import named_location

    location = named_location(dataset)
    problems = find_problems(location)
    typer.echo(to_json(problems) if as_json else as_text(location, problems))
    if problems:
        raise typer.Exit(3)


@app.command()
def schema(as_json: Json = False) -> None:
    """Print the JSON schema of mix.yaml, for editors and scripts; it is JSON with or without --json."""
    del as_json
    import json

    from llmt_prep.config import MixConfig

    typer.echo(json.dumps(MixConfig.model_json_schema(), indent=1))


@cache_app.command("list")
def list_cache(folder: CacheFolder = None, mix: CacheOfMix = None, as_json: Json = False) -> None:
    """Show what a cache holds, by tokenizer, by time of last use and by input file.

    Examples:

        llmt-prep cache list data/.llmt-cache

        llmt-prep cache list --mix mix.yaml --json
    """
    from llmt_prep.cache_contents import cache_contents, render_contents
    from llmt_prep.report import as_json as to_json

    contents = cache_contents(_cache_folder(folder, mix))
    typer.echo(to_json(contents) if as_json else render_contents(contents))


@cache_app.command("prune")
def prune_cache(
    folder: CacheFolder = None,
    mix: CacheOfMix = None,
    older_than: Annotated[
        str | None, typer.Option(help="Remove what was not used for so long: 90m, 12h, 30d, 2w.", show_default=False)
    ] = None,
    max_size: Annotated[
        str | None, typer.Option(help="Then the least recently used until the rest is no larger: 200GB.")
    ] = None,
    unused_by: Annotated[
        list[Path] | None, typer.Option(help="Remove what no such mix uses; give it once for each mix file.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Remove nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Remove tokenized input that can be made again. What killed runs left, and tokenizers without units, always goes.

    A cache that a run uses is left alone.

    Examples:

        llmt-prep cache prune data/.llmt-cache --older-than 30d --max-size 200GB

        llmt-prep cache prune --mix a.yaml --unused-by a.yaml --unused-by b.yaml --dry-run
    """
    from llmt_prep.cache_contents import parse_age, parse_size, prune, render_pruned
    from llmt_prep.config import MixConfig
    from llmt_prep.pipeline import units_of
    from llmt_prep.report import as_json as to_json
    from llmt_shared.config import load_config

    configs = [load_config(each, MixConfig) for each in unused_by or []]
    pruned = prune(
        _cache_folder(folder, mix),
        older_than=parse_age(older_than) if older_than is not None else None,
        max_bytes=parse_size(max_size) if max_size is not None else None,
        wanted=set().union(*map(units_of, configs)) if configs else None,
        dry_run=dry_run,
    )
    typer.echo(to_json(pruned) if as_json else render_pruned(pruned))


@tokenizer_app.command("extend")
def extend(
    tokenizer: Annotated[str, typer.Argument(help="Folder, tokenizer.json or hub id of a BPE tokenizer.")],
    out: Annotated[Path, typer.Option(help="Folder to make.", show_default=False)],
    tokens: Annotated[
        list[str] | None, typer.Option("--token", help="A new token; give it once for each.", show_default=False)
    ] = None,
    tokens_file: Annotated[
        Path | None, typer.Option(help="New tokens, one a line.", exists=True, dir_okay=False, show_default=False)
    ] = None,
    special_tokens: Annotated[
        list[str] | None, typer.Option("--special-token", help="A new special token.", show_default=False)
    ] = None,
    pad_token: Annotated[
        str | None, typer.Option(help="The padding token, added where it is not there.", show_default=False)
    ] = None,
    as_added_token: Annotated[
        bool, typer.Option("--as-added-token", help="Cut tokens out of the text before BPE where merges cannot.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Add tokens to a BPE tokenizer, with merges that lead to them; ids of old tokens stay.

    Examples:

        llmt-prep tokenizer extend path/to/tokenizer --tokens-file words.txt --out wider

        llmt-prep tokenizer extend path/to/tokenizer --pad-token "<|pad|>" --out padded
    """
    from llmt_prep.extension import extend_tokenizer, read_tokens, render_extended

    wanted = [*(tokens or ()), *(read_tokens(tokens_file) if tokens_file else ())]
    extended = extend_tokenizer(tokenizer, wanted, out, pad_token, special_tokens or (), as_added_token)
    typer.echo(render_extended(extended, out, as_json))


def _simulated(mix: Path, overrides: list[str], asked: str, workers: int | None, as_json: bool) -> str:
    from llmt_prep.config import MixConfig
    from llmt_prep.pipeline import simulate
    from llmt_prep.report import as_json as to_json
    from llmt_prep.simulation import parse_scenario
    from llmt_prep.simulation.render import render
    from llmt_prep.stopping import START_AGAIN, stoppable
    from llmt_shared.config import load_config

    config, scenario = load_config(mix, MixConfig, overrides), parse_scenario(asked)
    with stoppable(START_AGAIN):
        found = simulate(config, scenario, workers=workers)
    return to_json(found) if as_json else render(found)


def _cache_folder(folder: Path | None, mix: Path | None) -> Path:
    from llmt_prep.cache import cache_of
    from llmt_prep.config import MixConfig
    from llmt_shared.config import load_config
    from llmt_shared.errors import ConfigError

    if folder is not None and mix is None:
        return folder
    if mix is not None and folder is None:
        return cache_of(load_config(mix, MixConfig))
    raise ConfigError("which cache? wanted either its folder or --mix FILE")
