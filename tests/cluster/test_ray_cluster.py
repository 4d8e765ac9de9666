"""`isthmus up --ray-address`: a coordinator on a Ray cluster that somebody else runs."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from isthmus.coordinator.emulation.local_cluster import LocalCluster, alive_after
from tests.cluster.house import LIMIT, TINY, House, succeeded, wait_for, write_text
from tests.split.tiny_models import make_model

pytestmark = [pytest.mark.cluster, pytest.mark.processes]


@pytest.fixture
def ray_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """HOST:PORT of a Ray cluster of one node, with a token that this process and its children know."""
    token = tmp_path / "token"
    token.write_text("0123456789abcdef" * 4)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"]
    command += ["--node-ip-address=127.0.0.1", "--include-dashboard=false", "--disable-usage-stats", "--num-cpus=2"]
    command += ["--object-store-memory=100000000"]
    with (tmp_path / "ray.log").open("w") as log:
        head = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    processes = [psutil.Process(head.pid)]

    def listens() -> bool:
        assert head.poll() is None, (tmp_path / "ray.log").read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_for(listens, "the Ray cluster listens")
        yield f"127.0.0.1:{port}"
        assert head.poll() is None, "the coordinator has ended a cluster that is not its own"
    finally:
        processes += processes[0].children(recursive=True) if head.poll() is None else []
        head.send_signal(signal.SIGTERM)
        for left in alive_after(processes, LIMIT):
            left.kill()
        head.wait(LIMIT)
        current = Path("/tmp/ray/ray_current_cluster")  # where a later ray.init() would look for this cluster
        if current.exists() and current.read_text().endswith(f":{port}"):
            current.unlink()


def test_a_job_runs_on_a_cluster_that_goes_on_when_the_coordinator_has_left(ray_cluster: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "llama", layers=3)
    texts = {"edge": write_text(tmp_path / "edge.txt", 0)}
    with LocalCluster(tmp_path / "house", coordinator_threads=1) as cluster:
        cluster.start_coordinator(arguments=["--ray-address", ray_cluster])
        house = House(cluster, model, texts)
        house.start("edge")
        with house.connect() as connection:
            report = succeeded(connection, house.submit(connection, TINY.but(steps=4), ["edge"]))
        assert len(report["losses"]) == 4
        coordinator = cluster.processes["coordinator"]
        coordinator.send_signal(signal.SIGINT)
        assert coordinator.wait(60) == 0
