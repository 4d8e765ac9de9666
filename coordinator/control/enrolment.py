"""The enrolment server, the one door that opens without a certificate: a token and a CSR in, a certificate out."""

from __future__ import annotations

import ipaddress
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

import grpc.aio

from isthmus.coordinator.control.authority import MAX_CSR_BYTES, Authority
from isthmus.coordinator.control.devices import DeviceTable
from isthmus.coordinator.control.interceptors import ErrorInterceptor
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.protos.v1 import coordinator_pb2_grpc as rpc
from isthmus.split.errors import IsthmusError, NotEnrolled
from isthmus.split.tls import SERVER_OPTIONS, bind

log = logging.getLogger(__name__)

MAX_FAILURES = 10
"""Refused attempts from one address in `WINDOW_SECONDS`; after that the address waits."""
WINDOW_SECONDS = 60.0
_MAX_ADDRESSES = 4096


class FailureLimit:
    """Counts refused attempts for each address, and not those that succeed: a fleet may enrol from behind one NAT.

    A secret of 192 bits cannot be guessed at any speed; this keeps trying from costing signatures and log lines.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures: OrderedDict[str, deque[float]] = OrderedDict()  # the least recent address first

    def check(self, address: str) -> None:
        """Raises NotEnrolled while the address has to wait."""
        times = self._failures.get(address, deque())
        while times and times[0] <= self._clock() - WINDOW_SECONDS:
            times.popleft()
        if len(times) >= MAX_FAILURES:
            wait = times[0] + WINDOW_SECONDS - self._clock()
            raise NotEnrolled(f"too many failed enrolments from {address}: try again in {wait:.0f} s")

    def failed(self, address: str) -> None:
        self._failures.setdefault(address, deque(maxlen=MAX_FAILURES)).append(self._clock())
        self._failures.move_to_end(address)
        if len(self._failures) > _MAX_ADDRESSES:
            self._failures.popitem(last=False)


class EnrolmentServicer(rpc.EnrolmentServicer):
    def __init__(
        self, authority: Authority, devices: DeviceTable, control_port: int, limit: FailureLimit | None = None
    ) -> None:
        self._authority = authority
        self._devices = devices
        self._control_port = control_port
        self._limit = limit or FailureLimit()

    async def Enroll(
        self, request: pb.EnrollRequest, context: grpc.aio.ServicerContext[pb.EnrollRequest, pb.EnrollReply]
    ) -> pb.EnrollReply:
        address = _address_of(context.peer())
        self._limit.check(address)
        try:
            # Signed before the token is used: a CSR that cannot be signed does not cost the token, and what was
            # signed for a token that someone else used meanwhile is never sent and never valid.
            name = self._devices.token_name(request.token)
            certificate, serial = self._authority.sign_device(request.csr, name)
            self._devices.redeem_token(request.token, serial)
        except IsthmusError as error:
            self._limit.failed(address)
            log.warning("enrolment from %s refused: %s", address, error)
            raise
        log.info("device %s enrolled from %s, certificate %s", name, address, serial)
        return pb.EnrollReply(name=name, certificate=certificate, control_port=self._control_port)


async def start_enrolment(
    authority: Authority, devices: DeviceTable, host: str, port: int, control_port: int
) -> tuple[grpc.aio.Server, int]:
    """Serve enrolment on host:port (0: any free one). Returns the server, to be stopped, and its port."""
    sizes: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", MAX_CSR_BYTES + 1024),  # anybody may send here
        ("grpc.max_concurrent_streams", 16),
    ]
    options = [option for option in SERVER_OPTIONS if option[0] != sizes[0][0]] + sizes
    server = grpc.aio.server(interceptors=[ErrorInterceptor()], options=options)
    rpc.add_EnrolmentServicer_to_server(EnrolmentServicer(authority, devices, control_port), server)
    bound = bind(server, host, port, authority.enrolment_credentials())
    await server.start()
    return server, bound


def _address_of(peer: str) -> str:
    """The host of gRPC's `ipv4:1.2.3.4:5` or `ipv6:%5B::1%5D:5`; of IPv6 the /64, since a host has all of one."""
    host = unquote(peer).partition(":")[2].rpartition(":")[0].strip("[]").partition("%")[0]
    try:
        parsed = ipaddress.ip_address(host)
    except ValueError:  # a Unix socket
        return peer
    if isinstance(parsed, ipaddress.IPv6Address):
        mapped = parsed.ipv4_mapped
        return str(mapped or ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)
