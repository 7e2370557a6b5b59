"""New checkpoints and the Hub: compose, convert, push."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .base import Steps, app, import_package

FIELDS_BY_NAME = {"allow_extra_args": True, "ignore_unknown_options": True}


"""Lets config fields through; `config_fields_among` checks them, so that --help need not import the package."""


Out = Annotated[Path, typer.Option(help="Folder for the new checkpoint.", show_default=False)]
Vision = Annotated[str | None, typer.Option(help="Vision encoder: a folder or a name on the Hub.", show_default=False)]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(
        help="Type of the weights. Activations of some language models come near float16's largest number, 65,504.",
        show_default="the language model's",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace the checkpoint in the folder.")]
PushToHub = Annotated[
    str | None, typer.Option(help="Then publish it as YOU/NAME, as `crosslmm push` does.", show_default=False)
]
Private = Annotated[bool, typer.Option("--private", help="Make a private repository.")]
Untrained = Annotated[bool, typer.Option("--untrained", help="Publish untrained weights; the card says so.")]


@app.command(context_settings=FIELDS_BY_NAME)
def compose(
    context: typer.Context,
    out: Out,
    preset: Annotated[
        Literal["2B", "7B", "7B-16"] | None,
        typer.Option(help="A size of the paper: its backbones and pooled grid.", show_default=False),
    ] = None,
    vision: Vision = None,
    text: Annotated[
        str | None, typer.Option(help="Language model: a folder or a name on the Hub.", show_default=False)
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="A folder or a name on the Hub.", show_default="the language model's")
    ] = None,
    flavour: Annotated[
        Literal["paper", "recommended"], typer.Option(help="The paper's options, or those we recommend.")
    ] = "paper",
    long_context: Annotated[
        bool, typer.Option("--long-context", help="For Qwen2.5: 131,072 positions by YaRN instead of 32,768.")
    ] = False,
    dtype: Dtype = None,
    seed: Annotated[int, typer.Option(help="Seed of the new weights.")] = 0,
    force: Force = False,
    push_to_hub: PushToHub = None,
    private: Private = False,
    untrained: Untrained = False,
) -> None:
    """Compose a CrossLMM from a vision encoder and a language model, to be trained.

    The encoder is a SigLIP, SigLIP2, CLIP, DINOv2 or DINOv3; the language model a Qwen2, Qwen3, Llama, Mistral,
    SmolLM3 or another decoder that the cross-attention fits into. The tokenizer and its chat template are kept.
    All gates are 0: before training, the answers are the language model's own and say nothing about the video.
    Config fields are options too, such as --pooled-grid-size 1 or --v2v-scope frame.

    Example: crosslmm compose --preset 2B --flavour recommended --out crosslmm-2b
    """
    with Steps() as steps:
        import_package(steps, with_bars=True)
        from transformers_crosslmm.checkpoints import commands
        from transformers_crosslmm.checkpoints.compose import compose
    fields = config_fields_among(context)

    def plan() -> Any:
        return compose(
            vision,
            text,
            preset=preset,
            flavour=flavour,
            long_context=long_context,
            tokenizer=tokenizer,
            dtype=dtype,
            seed=seed,
            **fields,
        )

    for line in commands.write(plan, out, force=force, push_to_hub=push_to_hub, private=private, untrained=untrained):
        typer.echo(line)


@app.command(context_settings=FIELDS_BY_NAME)
def convert(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="The checkpoint: a folder or a name on the Hub.", show_default=False)],
    out: Out,
    name_table: Annotated[
        Path | None,
        typer.Option(help="JSON of the tensors' names, {theirs: ours, or null to leave out}.", show_default=False),
    ] = None,
    reverse: Annotated[
        bool, typer.Option("--reverse", help="Write a CrossLMM checkpoint in LLaVA-NeXT's layout.")
    ] = False,
    vision: Vision = None,
    dtype: Dtype = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the new weights.", show_default="0")] = None,
    force: Force = False,
    push_to_hub: PushToHub = None,
    private: Private = False,
    untrained: Untrained = False,
) -> None:
    """Convert a CrossLMM trained in LLaVA-NeXT's code base, bit for bit, or start a CrossLMM from a LLaVA.

    A LLaVA-OneVision or LLaVA-Video, in Transformers' format or LLaVA-NeXT's, gives its encoder, projector and
    language model to a CrossLMM to be trained. Config fields are options too, such as --pooled-grid-size 3.

    Example: crosslmm convert lmms-lab/LLaVA-Video-7B-Qwen2 --pooled-grid-size 3 --out crosslmm-7b
    """
    with Steps() as steps:
        import_package(steps, with_bars=True)
        from transformers_crosslmm.checkpoints import commands, llava, name_tables
    fields = config_fields_among(context)
    if reverse and (push_to_hub or fields or vision or dtype or seed is not None):
        raise typer.BadParameter(
            "--reverse changes nothing but the layout: only --name-table and --force can be given with it."
        )
    table = name_tables.read_name_table(name_table) if name_table else None
    if reverse:
        report = llava.crosslmm_to_llava_next(source, out, name_table=table, force=force)
        lines = commands.report_lines(report, out)
    else:

        def plan() -> Any:
            return commands.plan_conversion(source, name_table=table, vision=vision, dtype=dtype, seed=seed, **fields)

        lines = commands.write(plan, out, force=force, push_to_hub=push_to_hub, private=private, untrained=untrained)
    for line in lines:
        typer.echo(line)


def config_fields_among(context: typer.Context) -> dict[str, Any]:
    """The config fields among a command's unparsed arguments. Anything else there is wrong usage."""
    from transformers_crosslmm.checkpoints.commands import config_fields

    try:
        return config_fields(context.args)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


@app.command()
def push(
    folder: Annotated[str, typer.Argument(help="A checkpoint folder, with model and processor.")],
    repo: Annotated[str, typer.Argument(help="Name of the repository on the Hub, YOU/NAME.")],
    private: Private = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch to commit to, such as main. Needed if the repository exists.")
    ] = None,
    with_code: Annotated[
        bool, typer.Option("--with-code", help="Add the model's code, for loading without the package.")
    ] = False,
    untrained: Untrained = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the files and their sizes.")] = False,
) -> None:
    """Publish a checkpoint on the Hub, in one commit or not at all.

    Example: crosslmm push runs/mine YOU/NAME --private
    """
    with Steps() as steps:
        import_package(steps, with_bars=True)
    from transformers_crosslmm.checkpoints.publish import files_to_publish
    from transformers_crosslmm.checkpoints.publish import push as push_folder

    def list_files(files: list) -> None:
        for file in files:
            typer.echo(f"{file.size:>16,} B  {file.path}", err=not dry_run)
        typer.echo(f"{sum(file.size for file in files):>16,} B  in {len(files)} files, for {repo}", err=not dry_run)

    options: dict[str, Any] = {"with_code": with_code, "untrained": untrained}
    if dry_run:
        list_files(files_to_publish(folder, repo, **options))
        typer.echo("Nothing was sent.")
        return
    typer.echo(push_folder(folder, repo, private=private, revision=revision, on_files=list_files, **options))
