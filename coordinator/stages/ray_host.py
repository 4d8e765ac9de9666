"""Ray for the coordinator: a local one that starts and stops with the command, or an existing cluster.

Ray always listens on all interfaces, so its own token authentication is on, its dashboard and usage reports are off,
and docs/security.md says what to firewall.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from isthmus.split.errors import LinkLost, NotEnrolled, WrongState
from isthmus.split.tls import split_address, write_private


@contextmanager
def ray_running(state: Path, address: str | None) -> Iterator[ModuleType]:
    """Connects to the Ray cluster at `address`, or starts a local Ray; at the end it disconnects, or stops that Ray.

    state: the coordinator's state folder, with the local Ray's token.

    Raises WrongState without Ray, NotEnrolled for a cluster whose token is not known, and LinkLost for a Ray that
    cannot be joined or started.
    """
    if address is None:
        os.environ["RAY_AUTH_MODE"] = "token"
        _use_token(state)
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 makes the stage wait for all else here
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray hides the accelerator from a stage
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # a stage that waits leaves the cores to one that computes
    try:
        import ray
    except ImportError:
        raise WrongState("Ray is not installed; install it with: pip install 'isthmus[coordinator]'") from None
    if address is not None:
        _check_reachable(address)
    try:
        if address is None:
            ray.init(
                address="local",  # not a cluster that happens to be here
                include_dashboard=False,
                num_cpus=max(2, os.cpu_count() or 1),
                object_store_memory=100 * 2**20,  # nothing large goes through it: activations have their own servers
                _node_ip_address="127.0.0.1",
                namespace="isthmus",
                log_to_driver=False,
                configure_logging=False,
            )
        else:
            ray.init(address=address, namespace="isthmus", log_to_driver=False, configure_logging=False)
    except ray.exceptions.AuthenticationError:
        raise NotEnrolled(
            f"the Ray cluster at {address} takes no one without its token: name the file with RAY_AUTH_TOKEN_PATH"
        ) from None
    except (ConnectionError, RuntimeError, TimeoutError, ValueError, ray.exceptions.RayError) as error:
        where = f"the Ray cluster at {address} cannot be joined" if address else "Ray cannot be started"
        raise LinkLost(f"{where}: {' '.join(str(error).split())[:300]}") from None
    for number in (signal.SIGINT, signal.SIGTERM):  # Ray would print its stack; the caller handles them
        signal.signal(number, signal.getsignal(number))
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raises LinkLost within seconds where nobody listens at HOST:PORT; Ray itself would try for minutes."""
    if "://" in address or ":" not in address:
        return
    host, port = split_address(address)
    try:
        socket.create_connection((host, port), timeout=10).close()
    except OSError as error:
        raise LinkLost(
            f"the Ray cluster at {address} cannot be joined: {error.strerror or error}; "
            "is `ray start --head` running there?"
        ) from None


def _use_token(state: Path) -> None:
    """Makes sure that there is a token of this coordinator's own, which every process of its Ray reads."""
    path = state / "ray-token"
    if not path.exists():
        write_private(path, secrets.token_hex(32).encode())
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)
