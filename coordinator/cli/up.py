"""`isthmus up`: the coordinator, on a Ray of its own or on a cluster, until Ctrl-C."""

from __future__ import annotations

import fcntl
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isthmus.coordinator.cli.common import DEFAULT_STATE, Json, console, errors, print_json
from isthmus.coordinator.stages.ray_host import ray_running
from isthmus.split.errors import BadRequest, IsthmusError, LinkLost, WrongState
from isthmus.split.tls import private_folder

if TYPE_CHECKING:  # Ray comes with it
    from isthmus.coordinator.actor import ControlOptions


StateDir = Annotated[
    Path, typer.Option(help="Where the coordinator keeps its authority, devices, jobs and checkpoints.")
]
Host = Annotated[str, typer.Option(help="Address to listen on.")]
Port = Annotated[int, typer.Option(help="Control port; 0: any free one.", min=0, max=65535)]
EnrolmentPort = Annotated[int, typer.Option(help="Enrolment port; 0: any free one.", min=0, max=65535)]
Advertise = Annotated[
    str, typer.Option(help="Host name or address under which devices reach this machine; printed by `enroll`.")
]
StagePorts = Annotated[
    str, typer.Option(help="FIRST-LAST: ports for the stages of jobs, one each; empty: any free ones.")
]
RayAddress = Annotated[
    str | None, typer.Option(help="Join this Ray cluster (HOST:PORT) instead of starting a Ray here.")
]
Threads = Annotated[int, typer.Option(help="Processor threads of a stage; 0: all cores.", min=0)]
Device = Annotated[str, typer.Option(help="torch device of the stages: auto, cpu, cuda, ...")]
SlowDown = Annotated[
    float,
    typer.Option(
        help="Emulate a machine so many times slower in training jobs, as `isthmus-client run --slow-down` does. "
        "For trials and benchmarks.",
        min=1,
    ),
]


def up(
    state_dir: StateDir = DEFAULT_STATE,
    host: Host = "0.0.0.0",
    port: Port = 7443,
    enrolment_port: EnrolmentPort = 7444,
    advertise: Advertise = "127.0.0.1",
    stage_ports: StagePorts = "",
    ray_address: RayAddress = None,
    threads: Threads = 0,
    device: Device = "auto",
    slow_down: SlowDown = 1.0,
    json_output: Json = False,
) -> None:
    """Start the coordinator and serve until Ctrl-C or SIGTERM.

    The first start makes the certificate authority, and an administrator's
    credentials in STATE_DIR/admin, which the other commands use.

    Example: isthmus up --advertise cloud.example
    """
    ports = _port_range(stage_ports)
    state = private_folder(state_dir.expanduser().resolve())
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with _alone_in(state), ray_running(state, ray_address) as ray:
        from isthmus.coordinator.actor import ControlOptions  # it imports Ray, whose environment is set by now

        options = ControlOptions(str(state), host, port, enrolment_port, advertise, threads, device, ports, slow_down)
        control = _control_actor(ray, options)
        try:
            started = ray.get(control.start.remote())
            _tell_started(started, options, json_output)
            _wait(ray, control, stop)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, IsthmusError):
                raise error.cause from None
            raise
        except ray.exceptions.RayActorError:
            raise LinkLost("the control actor died; `isthmus up` starts again: jobs can be resumed") from None
        finally:
            _stop(ray, control)
    if not json_output:
        console.print("coordinator stopped")


def _control_actor(ray: ModuleType, options: ControlOptions) -> Any:
    """Starts the control actor on this machine of the Ray cluster."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from isthmus.coordinator.actor import ControlActor

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(ControlActor).options(num_cpus=0, max_concurrency=1000, scheduling_strategy=here)
    return actor.remote(options)


def _tell_started(started: dict[str, Any], options: ControlOptions, as_json: bool) -> None:
    if as_json:
        print_json({**started, "state": options.state, "advertise": options.advertise})
        return
    where = f"{options.advertise}:{started['port']}"
    console.print(f"coordinator: {where}   enrolment port: {started['enrolment_port']}")
    console.print(f"state: {options.state}   credentials: {started['admin']}", soft_wrap=True)
    if options.slow_down > 1:
        console.print(f"emulating a machine {options.slow_down:g} times slower in training jobs")
    for job in started["interrupted"]:
        console.print(f"job {job} was interrupted; go on with: isthmus finetune --resume {job}")
    console.print("devices join with what `isthmus enroll NAME` prints; Ctrl-C stops")


def _wait(ray: ModuleType, control: Any, stop: threading.Event) -> None:
    """Waits until the command has to stop. Raises Ray's RayActorError if the actor dies before."""
    while not stop.wait(1.0):
        try:
            ray.get(control.alive.remote(), timeout=30)
        except ray.exceptions.GetTimeoutError:  # a stalled disk, for example: it may come back
            errors.print("the control actor has not answered for 30 s; is this machine overloaded?")


@contextmanager
def _alone_in(state: Path) -> Iterator[None]:
    """Holds the state folder for this process. Raises WrongState while another coordinator has it."""
    with (state / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise WrongState(
                f"another coordinator is at work in {state}: stop it first, or choose another --state-dir"
            ) from None
        yield


def _port_range(text: str) -> tuple[int, int]:
    """Turns `7500-7519` into (7500, 7519), and an empty text into (0, 0). Raises BadRequest for other text."""
    if not text:
        return 0, 0
    first, _, last = text.partition("-")
    if not (first.isdigit() and last.isdigit() and 0 < int(first) <= int(last) < 65536):
        raise BadRequest(f"--stage-ports {text!r} is not FIRST-LAST, such as 7500-7519")
    return int(first), int(last)


def _stop(ray: ModuleType, control: Any) -> None:
    try:
        ray.get(control.stop.remote(), timeout=20)
    except (ray.exceptions.RayError, TimeoutError) as error:
        console.print(f"the control actor did not stop by itself ({type(error).__name__}); ending it")
    ray.kill(control)
