"""`isthmus-client`: what the owner of a device types."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from isthmus.client.generate import generate
from isthmus.client.identity import Identity, enrol
from isthmus.split.errors import BadData, BadRequest, IsthmusError, NotEnrolled
from isthmus.split.printable import LogFormatter, check_label, log_to_stderr, printable

if TYPE_CHECKING:  # torch, which --help does not need
    from isthmus.client.runner import DeviceOptions

log = logging.getLogger(__name__)

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _about() -> None:
    """The Isthmus edge daemon: takes part in fine-tuning and generation with text that stays on this device."""


Coordinator = Annotated[
    str, typer.Option(help="HOST:PORT of the coordinator; needed the first time.", envvar="ISTHMUS_COORDINATOR")
]
Token = Annotated[
    str, typer.Option(help="One-time token from `isthmus enroll`; needed the first time.", envvar="ISTHMUS_TOKEN")
]
TokenFile = Annotated[Path | None, typer.Option(help="A file that holds the token.")]
StateDir = Annotated[
    Path,
    typer.Option(help="Where this device keeps its key, its certificate and weights.", envvar="ISTHMUS_STATE_DIR"),
]
Data = Annotated[
    list[str] | None, typer.Option(help="NAME=FILE: offer a .txt, .jsonl or .csv file under a name. Repeatable.")
]
Models = Annotated[
    list[str] | None,
    typer.Option(
        help="MODEL=FOLDER: use this copy of a job's model (as the job names it, or its folder's last name) instead of "
        "fetching it. Repeatable."
    ),
]
Allow = Annotated[
    str,
    typer.Option(
        help="What this device does, separated by commas: splitlora and dlora (training), serve (holding blocks of a "
        "model that is served). Without labels-leave, jobs of `--labels server` are refused: in them the labels, which "
        "are the text, go to the coordinator. With modules-leave, what a dlora job's modules have learnt may go there: "
        "for `--killed merge` and `--aggregate`."
    ),
]
Device = Annotated[str, typer.Option(help="torch device: auto, cpu, cuda, cuda:1, ...")]
Threads = Annotated[int, typer.Option(help="Processor threads for computing; 0: all cores.", min=0)]
SlowDown = Annotated[
    float,
    typer.Option(
        help="Emulate a device so many times slower: in training, after each piece of computing, it waits until so "
        "many times the processor's time for it have passed. For trials and benchmarks; its log says so.",
        min=1,
    ),
]
JsonLog = Annotated[bool, typer.Option("--json", help="Log as JSON lines.")]


@app.command()
def run(
    coordinator: Coordinator = "",
    token: Token = "",
    token_file: TokenFile = None,
    state_dir: StateDir = Path("~/.isthmus/device"),
    data: Data = None,
    model: Models = None,
    allow: Allow = "splitlora,dlora,labels-leave,serve",
    device: Device = "auto",
    threads: Threads = 0,
    slow_down: SlowDown = 1.0,
    json_output: JsonLog = False,
) -> None:
    """Enrol (the first time), connect, and work until stopped by Ctrl-C or SIGTERM.

    The files stay here; hidden states, gradients and adapters leave. In a job
    of `--labels server` the labels, which are the text, leave too: the log
    says so, and `--allow splitlora` refuses such jobs.

    Example: isthmus-client run --coordinator cloud.example:7443 --token ist1.… --data notes=notes.txt
    """
    log_to_stderr("%(asctime)s %(levelname)s %(message)s", formatter=_JsonLines if json_output else LogFormatter)
    from isthmus.client.runner import TASK_KINDS, DeviceOptions  # torch and gRPC, which --help does not need
    from isthmus.split.models.precision import pick_device

    state = state_dir.expanduser()
    options = DeviceOptions(
        state=state,
        data=_files(data or []),
        models=_folders(model or []),
        allow=_kinds(allow, TASK_KINDS),
        device=device,
        threads=threads,
        slow_down=slow_down,
    )
    pick_device(device)  # so that a device that is not there shows now, not with the first task
    token = token or _read_token(token_file)
    try:
        identity = Identity.open(state)
        if identity is not None and coordinator:
            identity = identity.moved_to(coordinator)
        if identity is not None:
            _work(identity, options)
    except NotEnrolled as refused:  # revoked, expired or damaged: a token lets the device in again
        if not (coordinator and token):
            raise
        log.warning("%s; trying the token", refused)
        identity = None
    if identity is None:
        _work(_enrol(state, coordinator, token), options)
    log.info("left the coordinator")


def _work(identity: Identity, options: DeviceOptions) -> None:
    """Takes part until Ctrl-C or SIGTERM."""
    from isthmus.client.daemon import Daemon

    async def serve() -> None:
        daemon = Daemon(identity, options)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, daemon.stop)
        await daemon.run()

    asyncio.run(serve())


app.command()(generate)


def _enrol(state: Path, coordinator: str, token: str) -> Identity:
    if not coordinator or not token:
        raise NotEnrolled(
            "this device is not enrolled: give --coordinator HOST:PORT and --token TOKEN, "
            "as `isthmus enroll NAME` prints them"
        )
    return enrol(state, coordinator, token)


def _read_token(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        return path.expanduser().read_text().strip()
    except OSError as error:
        raise BadRequest(f"the token file {path} cannot be read: {error.strerror}") from None


def _files(pairs: list[str]) -> dict[str, Path]:
    files = _paths("--data", pairs)
    for name, path in files.items():
        if not path.is_file():
            raise BadData(f"--data {name}: there is no file {path}")
    return files


def _folders(pairs: list[str]) -> dict[str, Path]:
    folders = _paths("--model", pairs)
    for name, path in folders.items():
        if not path.is_dir():
            raise BadRequest(f"--model {name}: there is no folder {path}")
    return folders


def _paths(option: str, pairs: list[str]) -> dict[str, Path]:
    paths: dict[str, Path] = {}
    for text in pairs:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise BadRequest(f"{option} {text!r} is not NAME=PATH")
        if name in paths:
            raise BadRequest(f"{option} has the name {name!r} twice: every name stands for one path")
        paths[check_label(name, f"a name of {option}")] = Path(value).expanduser().resolve()
    return paths


def _kinds(text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    kinds = tuple(part.strip() for part in text.split(",") if part.strip())
    unknown = [kind for kind in kinds if kind not in known]
    if unknown:
        raise BadRequest(f"--allow {unknown[0]!r} is not one of {', '.join(known)}")
    return kinds


class _JsonLines(LogFormatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {"time": record.created, "level": record.levelname.lower(), "message": printable(record.getMessage())}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def main() -> None:
    """Runs the command; an error that is no bug ends with one line and exit status 1."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # a device that waits for the link leaves its cores to others
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # else transformers shows one for each file it opens
    try:
        app()
    except IsthmusError as error:
        typer.echo(f"isthmus-client: {printable(str(error))}", err=True)
        raise SystemExit(1) from None
    except OSError as error:  # such as a full disk, or a file that may not be written
        typer.echo(f"isthmus-client: {error.filename or 'input or output'}: {error.strerror or error}", err=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
