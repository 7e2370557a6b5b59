"""The `crosslmm` command. It imports the package, which takes seconds, only when a command runs."""

from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def crosslmm() -> None:
    """CrossLMM: language models that look back at long videos."""


@app.command()
def push(
    folder: Annotated[str, typer.Argument(help="A checkpoint folder: model and processor.")],
    repo: Annotated[str, typer.Argument(help="Name of the repository on the Hub, YOU/NAME.")],
    private: Annotated[bool, typer.Option("--private", help="For you alone.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to, in a repository that may exist.")] = None,
    with_code: Annotated[bool, typer.Option("--with-code", help="Loads without the package as well.")] = False,
    untrained: Annotated[
        bool, typer.Option("--untrained", help="Publish what was never trained, and say so.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the files and their sizes.")] = False,
) -> None:
    """Publish a checkpoint on the Hub: everything in one commit, or nothing."""
    from transformers_crosslmm.publishing_crosslmm import PublishingError, files_to_publish
    from transformers_crosslmm.publishing_crosslmm import push as push_folder

    try:
        if dry_run:
            files = files_to_publish(folder, repo, with_code=with_code, untrained=untrained)
            for file in files:
                typer.echo(f"{file.size:>16,} B  {file.path}")
            typer.echo(
                f"{sum(file.size for file in files):>16,} B  in {len(files)} files, for {repo}; nothing was sent"
            )
            return
        url = push_folder(folder, repo, private=private, revision=revision, with_code=with_code, untrained=untrained)
        typer.echo(url)
    except (PublishingError, ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    app()
