"""`isthmus`: what platform engineers, ML engineers and researchers type."""

from __future__ import annotations

import os

import typer

from isthmus.coordinator.cli import codecs, demo, devices, evaluate, finetune, generate, jobs, link, serve, up
from isthmus.split.errors import IsthmusError
from isthmus.split.printable import printable

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _about() -> None:
    """Fine-tune and run large language models across a cloud coordinator and edge devices."""


app.command()(up.up)
app.command()(devices.enroll)
app.command("devices")(devices.devices)
app.command()(devices.revoke)
app.command()(finetune.finetune)
app.command("jobs")(jobs.jobs)
app.command()(jobs.watch)
app.command()(jobs.report)
app.command()(jobs.cancel)
app.command()(jobs.export)
app.command()(evaluate.evaluate)
app.command()(serve.serve)
app.command()(generate.generate)
app.command()(generate.chat)
app.command()(demo.demo)
app.command()(link.link)
app.command()(codecs.codecs)


def main() -> None:
    """Runs the command; an error that is no bug ends with one line and exit status 1."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # else transformers shows one for each file it opens
    try:
        app()
    except IsthmusError as error:
        typer.echo(f"isthmus: {printable(str(error))}", err=True)
        raise SystemExit(1) from None
    except OSError as error:  # such as a full disk, or a file that may not be written
        typer.echo(f"isthmus: {error.filename or 'input or output'}: {error.strerror or error}", err=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
