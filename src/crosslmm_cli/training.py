"""Training: train, data check."""

from typing import Annotated

import typer

from .base import Model, Steps, app, chosen_checkpoint, import_package


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="A YAML file of options, or stage1_pretrain, stage2_instruct, adapt.")],
) -> None:
    """Train a model, or resume where the same command stopped.

    A recipe is a YAML file of options; options after the recipe override it. They are those of Transformers'
    TrainingArguments (such as --output_dir, --learning_rate, --max_steps, --report_to) and these: --model (the first
    checkpoint), --train_data, --media_root, --streaming; --num_frames, --fps, --max_frames and --add_timestamps of
    each video; --unusable (raise or skip), --max_length; --trained_parts, --gate_learning_rate,
    --vision_learning_rate, --language_model_learning_rate, --global_batch_size, --attn_implementation. To have them
    explained: python -m transformers_crosslmm.training.trainer --help

    Example: crosslmm train adapt --model MODEL --train_data chats.jsonl --media_root videos --output_dir runs/mine
    """
    with Steps() as steps:
        import_package(steps, with_bars=True)
        from transformers_crosslmm.training.trainer import main

    main([recipe, *context.args])


data = typer.Typer(no_args_is_help=True, help="Check training data.")


app.add_typer(data, name="data")


@data.command()
def check(
    path: Annotated[str, typer.Argument(help="The value of --train_data: a .json, .jsonl or .yaml, or a dataset.")],
    media_root: Annotated[str | None, typer.Option(help="Folder that media file names are relative to.")] = None,
    decode: Annotated[bool, typer.Option("--decode", help="Decode all media too, as training would.")] = False,
    model: Model = None,
) -> None:
    """List broken records with file and line, and media files that do not exist.

    With --decode, also list records whose media do not decode; frames are sampled by the processor of --model. With
    --model, warn if the tokenizer splits the answers' words into single bytes.

    Example: crosslmm data check mixture.yaml --media-root videos
    """
    with Steps() as steps:
        import_package(steps)
        from transformers_crosslmm.training.datasets import find_broken, spelled_words
        from transformers_crosslmm.training.records import load_records

        records = load_records(path)
        if len(records) == 0:
            raise ValueError(f"{path} has no records.")
        steps.begin(f"Checking {len(records):,} records")
        num_broken = 0
        processor = None
        if decode or model is not None:
            from transformers_crosslmm.checkpoints.load import load_processor

            processor = load_processor(chosen_checkpoint(model))
        for line in find_broken(records, media_root, decode_with=processor if decode else None):
            typer.echo(line)
            num_broken += 1
        spelled, words = spelled_words(records, processor.tokenizer) if model is not None else (0, 0)
    if spelled > words / 4:
        typer.echo(
            f"warning: {model} spells {spelled:,} of {words:,} words of the answers byte by byte, and will hardly "
            "learn them. Compose a model with a language model that knows them (docs/fine-tune.md).",
            err=True,
        )
    typer.echo(f"{len(records):,} records, {num_broken:,} broken", err=True)
    if num_broken:
        raise typer.Exit(1)
