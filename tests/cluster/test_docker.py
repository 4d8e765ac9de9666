"""docker-compose.yml in a real engine: the job of the demo as containers, and the adapter that comes out of it.

Opt-in, for building the images takes minutes and a base image: ISTHMUS_TEST_DOCKER=1, an engine that runs, and
`docker compose` or docker-compose. ISTHMUS_TEST_DOCKER_BUILD has further arguments of `docker build`.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from isthmus.split.data.documents import read_documents, split_documents
from isthmus.split.data.stdlib_text import private_text
from isthmus.split.job.groups import TextSettings
from isthmus.split.models.default_model import DEFAULT_MODEL_FOLDER
from isthmus.split.training.evaluate import evaluate_files

ROOT = Path(__file__).resolve().parent.parent.parent
PROJECT = "isthmus-test"
EDGES = ("email", "unittest", "pydecimal")

pytestmark = [
    pytest.mark.docker,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(os.environ.get("ISTHMUS_TEST_DOCKER") != "1", reason="only with ISTHMUS_TEST_DOCKER=1"),
]


def output(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}: {done.stderr[-3000:]}"
    return done.stdout


def compose(*arguments: str) -> list[str]:
    plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode == 0
    return [*(["docker", "compose"] if plugin else ["docker-compose"]), "-p", PROJECT, *arguments]


@pytest.fixture(scope="module")
def images() -> None:
    for target in ("client", "coordinator"):
        extra = shlex.split(os.environ.get("ISTHMUS_TEST_DOCKER_BUILD", ""))
        output("docker", "build", *extra, "--target", target, "-t", f"isthmus-{target}", ".")


@pytest.fixture(scope="module")
def job(images: None) -> Iterator[str]:
    """The container of a job that has ended well."""
    up = compose("up", "--no-build", "--abort-on-container-exit", "--exit-code-from", "job")
    try:
        done = subprocess.run(up, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
        yield output(*compose("ps", "-a", "-q", "job")).strip()
    finally:
        output(*compose("down", "--volumes"))


def test_the_adapter_made_in_containers_loads_with_peft_and_lowers_perplexity(job: str, tmp_path: Path) -> None:
    output("docker", "cp", f"{job}:/out/adapter", str(tmp_path / "adapter"))
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(DEFAULT_MODEL_FOLDER), str(tmp_path / "adapter"))
    config = TextSettings(validation_fraction=0.05)
    text, held_out = tmp_path / "email.txt", tmp_path / "held-out.txt"
    text.write_text(private_text("email"))
    _, documents = split_documents(read_documents(text, config), config.validation_fraction)
    held_out.write_text("".join(document.text for document in documents))
    before = evaluate_files("default", [held_out], data=config)
    after = evaluate_files("default", [held_out], adapter=tmp_path / "adapter", data=config)
    assert after.perplexity < 0.95 * before.perplexity


def test_no_token_is_in_any_containers_environment_or_command_line(job: str) -> None:
    described = json.loads(output("docker", "inspect", *output(*compose("ps", "-a", "-q")).split()))
    assert len(described) == 2 + len(EDGES)
    assert "ist1." not in json.dumps([[one["Config"], one["Args"]] for one in described])


def test_an_edge_kept_its_own_text_and_no_other_container_has_it(job: str, tmp_path: Path) -> None:
    container = output(*compose("ps", "-a", "-q", "pydecimal")).strip()
    output("docker", "cp", f"{container}:/data/notes.txt", str(tmp_path / "notes.txt"))
    assert "class Decimal" in (tmp_path / "notes.txt").read_text()
    for other in (job, output(*compose("ps", "-a", "-q", "coordinator")).strip()):
        missing = subprocess.run(["docker", "cp", f"{other}:/data", str(tmp_path)], capture_output=True, check=False)
        assert missing.returncode != 0


def test_the_image_of_a_device_has_neither_ray_nor_a_database_and_is_not_root(images: None) -> None:
    run = ["docker", "run", "--rm", "--entrypoint", "python", "isthmus-client", "-c"]
    code = "import importlib.util as u, os; print([bool(u.find_spec(m)) for m in ('ray', 'sqlalchemy')], os.getuid())"
    assert output(*run, code).strip() == "[False, False] 10001"
