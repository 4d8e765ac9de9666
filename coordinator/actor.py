"""The control actor: the one Ray actor that devices and admins talk to. It owns the state folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import ray

from isthmus.coordinator.control.authority import Authority
from isthmus.coordinator.control.database import Database
from isthmus.coordinator.control.enrolment import start_enrolment
from isthmus.coordinator.control.interceptors import ErrorInterceptor
from isthmus.coordinator.control.sessions import Sessions
from isthmus.coordinator.gateway.actor import GatewayActor, GatewayTask
from isthmus.coordinator.jobs.jobs import Jobs
from isthmus.coordinator.servicer import CoordinatorServicer
from isthmus.coordinator.stages.measure import MeasureTask, measure_node, measure_training_here
from isthmus.coordinator.stages.stage_actor import ServingOptions, StageActor, StageTask
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.protos.v1 import coordinator_pb2_grpc
from isthmus.split.printable import log_to_stderr
from isthmus.split.tls import SERVER_OPTIONS, bind, join_address


@dataclass(frozen=True)
class ControlOptions:
    """What `isthmus up` was told."""

    state: str
    host: str  # address to listen on
    port: int  # 0 for any free one
    enrolment_port: int
    advertise: str  # the host under which devices reach this one
    threads: int  # threads of a stage actor; 0 for all cores
    device: str  # torch device of the stages
    stage_ports: tuple[int, int]  # first and last port; (0, 0) for any free one
    slow_down: float = 1.0  # emulates stages on a machine that is this many times slower


class ControlActor:
    """Runs the control plane. `isthmus up` makes it a Ray actor."""

    def __init__(self, options: ControlOptions) -> None:
        log_to_stderr("%(asctime)s %(name)s: %(message)s")
        self._options = options
        self._servers: list[grpc.aio.Server] = []
        self._profile: pb.Profile | None = None  # profile of the node where a model is served
        self._training = 0.0  # FLOP/s of a stage; 0 until it is measured

    async def start(self) -> dict[str, Any]:
        """Opens the state folder, listens, and returns {"port", "enrolment_port", "admin", "interrupted"}.

        Raises IsthmusError for a port that is taken, and for a state folder that cannot be used.
        """
        options = self._options
        state = Path(options.state)
        self._authority = Authority.open(state)
        self._database = Database(state / "state.db")
        self._sessions = Sessions()
        self._jobs = Jobs(
            self._database, self._sessions, state, self._start_stage, self._measure, self._measure_training
        )
        server = grpc.aio.server(interceptors=[ErrorInterceptor()], options=SERVER_OPTIONS)
        port = bind(server, options.host, options.port, self._authority.control_credentials())
        enrolment, enrolment_port = await start_enrolment(
            self._authority, self._database.devices, options.host, options.enrolment_port, port
        )
        self._servers = [enrolment, server]
        interrupted = self._database.jobs.interrupt_running()
        servicer = CoordinatorServicer(self._database, self._sessions, self._jobs, self._authority.pin, enrolment_port)
        coordinator_pb2_grpc.add_CoordinatorServicer_to_server(servicer, server)
        await server.start()
        self._port = port
        admin = self._authority.write_admin(options.advertise, port)
        return {
            "port": port,
            "enrolment_port": enrolment_port,
            "admin": str(admin),
            "interrupted": interrupted,
        }

    async def stage_event(self, job: str, event: bytes) -> None:
        """Takes an event from a job's stage or gateway actor.

        event: a serialised Event.
        """
        await self._jobs.stage_event(job, pb.Event.FromString(event))

    async def alive(self) -> bool:
        return True

    async def stop(self) -> None:
        if not self._servers:  # the start has failed
            return
        await self._jobs.stop()
        for session in self._sessions.all():
            session.end()
        for server in self._servers:
            await server.stop(grace=1)
        self._database.close()

    async def _measure(self, quiet: bool) -> pb.Profile:
        """Profile of a node that serves, measured when it is first asked for.

        quiet: whether nothing else is at work, so that the measurement is worth keeping.

        Raises RayError and IsthmusError.
        """
        if self._profile is not None:
            return self._profile
        options = self._options
        everywhere = options.host in ("", "0.0.0.0", "::")
        certificate, key = self._authority.issue_stage("measure")
        task = MeasureTask(
            file=str(Path(options.state) / "speed.json"),
            keep=quiet,
            threads=options.threads,
            device=options.device,
            control=join_address(ray.util.get_node_ip_address() if everywhere else options.host, self._port),
            ca=self._authority.ca_pem,
            certificate=certificate,
            key=key,
        )
        where: Any = ray.remote(measure_node).options(num_cpus=0, scheduling_strategy="SPREAD", max_retries=0)
        profile = pb.Profile.FromString(await where.remote(task))
        if quiet:
            self._profile = profile
        return profile

    async def _measure_training(self) -> float:
        """FLOP/s of a node that a stage may get, measured when it is first asked for. Raises RayError."""
        if not self._training:
            where: Any = ray.remote(measure_training_here).options(num_cpus=0, max_retries=0)
            options = self._options
            self._training = await where.remote(options.threads, options.device, options.slow_down)
        return self._training

    async def _start_stage(self, task: StageTask | GatewayTask) -> tuple[Any, str]:
        """Starts a stage or gateway actor; returns it, and where devices reach it.

        On this node the host is empty and stands for the one under which devices know the coordinator.
        """
        certificate, key = self._authority.issue_server()
        stage_certificate, stage_key = self._authority.issue_stage(task.job)
        serving = ServingOptions(
            host=self._options.host,
            certificate=certificate,
            key=key,
            ca=self._authority.ca_pem,
            threads=self._options.threads,
            device=self._options.device,
            ports=self._options.stage_ports,
            slow_down=self._options.slow_down,
            stage_certificate=stage_certificate,
            stage_key=stage_key,
        )
        control = ray.get_runtime_context().current_actor
        made = StageActor if isinstance(task, StageTask) else GatewayActor
        actor: Any = ray.remote(made).options(num_cpus=1).remote(task, serving, control)
        try:
            port, node = await actor.start.remote()
        except BaseException:  # even when cancelled, a half-started stage must not stay
            ray.kill(actor)
            raise
        here = ray.get_runtime_context().get_node_id()
        return actor, f":{port}" if node["id"] == here else f"{node['address']}:{port}"
