"""`isthmus enroll`, `devices` and `revoke`."""

from __future__ import annotations

import time
from typing import Annotated

import typer
from rich.table import Column, Table

from isthmus.coordinator.cli.common import (
    DEFAULT_CREDENTIALS,
    Address,
    CredentialsFolder,
    Json,
    as_dict,
    console,
    human_bytes,
    print_json,
)
from isthmus.coordinator.connection import connected
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.split.printable import printable


def enroll(
    name: Annotated[str, typer.Argument(help="The device's name: 1 to 63 of a-z, 0-9 and -.")],
    lifetime: Annotated[float, typer.Option(help="Seconds for which the token can be used.", min=1)] = 3600,
    credentials: CredentialsFolder = DEFAULT_CREDENTIALS,
    coordinator: Address = "",
    json_output: Json = False,
) -> None:
    """Make a one-time token for a device, and print the command that enrols it.

    NAME is 1 to 63 of a-z, 0-9 and -; a known name enrols that device anew.

    The token also pins the coordinator's certificate authority.

    Example: isthmus enroll phone
    """
    with connected(credentials, coordinator) as connection:
        reply = connection.stub.CreateToken(pb.CreateTokenRequest(name=name, lifetime_seconds=lifetime))
    command = f"isthmus-client run --coordinator {connection.address} --token {reply.token} --data NAME=FILE"
    if json_output:
        print_json(
            {
                "name": name,
                "token": reply.token,
                "expires": reply.expires,
                "coordinator": connection.address,
                "enrolment_port": reply.enrolment_port,
                "command": command,
            }
        )
        return
    console.print(f"On the device, within {lifetime / 60:.0f} minutes (the token works once):")
    typer.echo(printable(command))  # not wrapped, for it is to be copied


def devices(
    credentials: CredentialsFolder = DEFAULT_CREDENTIALS, coordinator: Address = "", json_output: Json = False
) -> None:
    """List the enrolled devices: connected or not, what they offer, how fast they are, what they work on.

    A device decodes so many bytes of float32 weights a second; the round trip is that of one token.

    Example: isthmus devices
    """
    with connected(credentials, coordinator) as connection:
        reply = connection.stub.ListDevices(pb.ListDevicesRequest())
    if json_output:
        print_json([as_dict(device) for device in reply.devices])
        return
    if not reply.devices:
        console.print("no devices yet; `isthmus enroll NAME` makes a token for one")
        return
    names = (Column(name, no_wrap=True) for name in ("device", "state"))
    table = Table(*names, "offers", "cores", "memory", "decodes", "round trip", "job", "last seen")
    for device in reply.devices:
        state = "revoked" if device.revoked else "connected" if device.connected else "away"
        offers = ", ".join(f"{data.name} ({human_bytes(data.bytes)})" for data in device.profile.datasets)
        seen = f"{max(0.0, time.time() - device.last_seen):.0f} s ago" if device.last_seen else "never"
        memory = human_bytes(device.profile.memory_bytes)
        speed = max((one.bytes_per_second for one in device.profile.speeds if one.weights == "float32"), default=0.0)
        decodes = f"{speed / 1e9:.3g} GB/s" if speed else "unknown"
        linked = device.profile.HasField("link")
        trip = f"{1000 * device.profile.link.round_trip_seconds:.3g} ms" if linked else "unknown"
        table.add_row(device.name, state, offers, str(device.profile.cores), memory, decodes, trip, device.job, seen)
    console.print(table)


def revoke(
    name: Annotated[str, typer.Argument(help="The device's name.")],
    credentials: CredentialsFolder = DEFAULT_CREDENTIALS,
    coordinator: Address = "",
    json_output: Json = False,
) -> None:
    """Put a device out: its certificate stops working at once, also in a job that runs.

    Example: isthmus revoke phone
    """
    with connected(credentials, coordinator) as connection:
        connection.stub.RevokeDevice(pb.RevokeDeviceRequest(name=name))
    if json_output:
        print_json({"name": name, "revoked": True})
    else:
        console.print(f"{name} is revoked; `isthmus enroll {name}` lets it in again")
