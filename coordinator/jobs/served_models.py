"""Served models, for the devices that use them themselves."""

from __future__ import annotations

import contextlib

from ray.exceptions import RayActorError

from isthmus.coordinator.control.sessions import Session
from isthmus.coordinator.jobs.runs import Runs
from isthmus.coordinator.jobs.weights import DeviceWeights
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.split.errors import BadRequest, NotAllowed, NotFound, WrongState


class ServedModels:
    """The models served by the runs that are under way."""

    def __init__(self, runs: Runs) -> None:
        self._runs = runs

    async def find(self, name: str, device: str, serial: str) -> pb.Served:
        """Finds a model that this device may use itself, and lets its gateway know the device's certificate.

        name: the name of the model, of one of its adapters, or of its job; empty for the only model.
        serial: the serial of the device's certificate.

        Raises NotFound or NotAllowed where there is none, BadRequest where there are several, WrongState where it is
        not served yet.
        """
        mine = {run.job: (run, served) for run, served in self._runs.usable_by(device)}
        names = {job: served.config.name for job, (_, served) in mine.items()}
        found = [job for job, (_, served) in mine.items() if name in ("", job, *served.config.names)]
        if not found:
            if any(name in (run.job, *served.config.names) for run, served in self._runs.served()):
                raise NotAllowed(f"device {device} may not use {name}: `isthmus serve --users {device}` allows it")
            usable = ", ".join(sorted(names.values())) or "none"
            what = f"no model {name[:80]!r}" if name else "no model"
            raise NotFound(f"{what} is served that device {device} may use; there is: {usable}")
        if len(found) > 1:
            named = ", ".join(f"{names[job]} ({job})" for job in found)
            raise BadRequest(f"several models are served: {named}; name one, or its job, with --model")
        run, served = mine[found[0]]
        if not run.stage_address:
            raise WrongState(f"{names[run.job]} is not served yet: try again in a moment")
        with contextlib.suppress(RayActorError):  # the job's own waiting sees that its gateway has died
            await run.stage.allow.remote(device, serial)
        return pb.Served(job=run.job, gateway=run.stage_address, serving=served.for_devices())

    def user_weights(self, job: str, device: str, blocks: int) -> DeviceWeights:
        for run, served in self._runs.usable_by(device):
            if run.job == job:
                return served.user_weights(blocks)
        raise NotAllowed(f"device {device} may not use job {job[:32]}")

    async def device_connected(self, session: Session) -> None:
        """Makes gateways let the device in with the certificate that it has now, and not with an earlier one."""
        for used, _ in self._runs.usable_by(session.name):
            if session.name not in used.devices and used.stage is not None:
                await used.stage.allow.remote(session.name, session.serial)

    async def revoke(self, device: str) -> None:
        for used, _ in self._runs.usable_by(device):
            if device not in used.devices and used.stage is not None:
                await used.stage.revoke.remote(device)
