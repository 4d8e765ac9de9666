"""Options made from a configuration, and the file that holds them: the same names, one order of who wins, one line for
what cannot be."""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import subprocess
import sys
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from isthmus.coordinator.cli.config_file import MOST_BYTES, file_keys
from isthmus.coordinator.cli.main import app
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.split.errors import BadRequest
from isthmus.split.inference.serving import AdapterConfig, ServingConfig, parse_stages
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.grouped import Grouped

ROOT = Path(__file__).resolve().parents[3]
CONFIGS: dict[str, type[Grouped]] = {"finetune": TrainingConfig, "serve": ServingConfig}
DATASET = ("--dataset", "notes")
CLICK_TYPES = {int: click.INT, float: click.FLOAT, str: click.STRING, bool: click.BOOL}


class Submitted(Exception):
    """A command has come as far as submitting its job."""

    def __init__(self, spec: pb.JobSpec) -> None:
        self.spec = spec


class Stub:
    def SubmitJob(self, request: pb.SubmitJobRequest) -> pb.Job:
        raise Submitted(request.spec)


class Connection:
    stub = Stub()


def command(name: str) -> click.Command:
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group)
    return group.commands[name]


def submitted(name: str, *options: str) -> pb.JobSpec:
    """The job that a command submits. Raises what the command raises."""

    @contextmanager
    def connected(*_: Any) -> Iterator[Connection]:
        yield Connection()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(importlib.import_module(f"isthmus.coordinator.cli.{name}"), "connected", connected)
        error = CliRunner().invoke(app, [name, *options]).exception
    if not isinstance(error, Submitted):
        assert error is not None
        raise error
    return error.spec


def training(*options: str) -> TrainingConfig:
    return TrainingConfig.from_json(submitted("finetune", *options).training)


def serving(*options: str) -> ServingConfig:
    return ServingConfig.from_json(submitted("serve", "--api-key", "k", *options).serving)


def printed(name: str, *options: str) -> str:
    result = CliRunner().invoke(app, [name, *options, "--print-config"])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "job.yaml"


@pytest.mark.parametrize("name", CONFIGS)
def test_every_setting_has_one_option_with_its_type_default_and_help(name: str) -> None:
    options = {option.name: option for option in command(name).params}
    config = CONFIGS[name]()
    for one in config.settings():
        if not one.option:
            continue
        option = options.pop(one.name)
        assert isinstance(option, click.Option)
        assert option.help == one.help
        assert "--" + one.option.replace("_", "-") in option.opts
        group = getattr(config, one.group) if one.group else config
        declared = typing.get_type_hints(type(group))[one.field.name]
        kind = next(kind for kind in (declared, *typing.get_args(declared), str) if kind in CLICK_TYPES)
        if one.by_name or one.listed:
            kind = str
            assert option.default == (",".join(one.field.default) if one.listed else str(one.field.default))
        else:
            assert option.default == one.field.default
        assert option.type.name == CLICK_TYPES[kind].name


def test_the_options_fill_every_setting_but_those_that_an_option_by_name_fills() -> None:
    without = {one.name for one in TrainingConfig.settings() if not one.option}
    assert without == {"method", "cuts", "ranks"}
    assert {one.by_name for one in TrainingConfig.settings()} - {""} == {"cuts", "ranks"}
    assert {one.name for one in ServingConfig.settings() if not one.option} == {
        "spans", "name", "adapters", "key_sha256",
    }  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_names_of_settings_are_theirs_alone(name: str) -> None:
    names = [one.name for one in CONFIGS[name].settings()]
    assert len(set(names)) == len(names)


def test_without_options_the_configuration_is_the_default() -> None:
    assert training(*DATASET) == TrainingConfig()
    assert serving() == ServingConfig.of(name="default", key_sha256=hashlib.sha256(b"k").hexdigest())


def test_options_have_the_names_of_before() -> None:
    options = (
        "--method dlora --cut-layer phone=2,auto --rank 4,phone=2 --alpha 8 --target-modules q_proj,v_proj "
        "--optimizer sgd --learning-rate 0.01 --aggregate --aggregate-every 5 --packing padded --seed 3"
    )
    assert training(*DATASET, *options.split()) == TrainingConfig.of(
        method="dlora",
        cuts="phone=2,auto",
        rank=4,
        ranks="4,phone=2",
        alpha=8.0,
        target_modules=("q_proj", "v_proj"),
        optimizer="sgd",
        learning_rate=0.01,
        aggregate=True,
        aggregate_every=5,
        packing="padded",
        seed=3,
    )
    assert serving("--users", "a,b", "--port", "80", "--exit-threshold", "0.9", "--stages", "a:0-2,cloud:2-4").but(
        key_sha256=""
    ) == ServingConfig.of(
        name="default", users=("a", "b"), port=80, exit_threshold="0.9", spans=parse_stages("a:0-2,cloud:2-4")
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_the_printed_file_is_yaml_and_prints_itself(name: str, file: Path) -> None:
    text = printed(name)
    file.write_text(text)
    assert printed(name, "--config", str(file)) == text
    values = yaml.safe_load(text)
    groups = {one.group for one in CONFIGS[name].settings()} - {""}
    assert {key for key, value in values.items() if isinstance(value, dict)} == groups
    known = file_keys(command(name), CONFIGS[name])
    flat = {(group, key) for group in groups for key in values[group]} | {("", key) for key in set(values) - groups}
    assert flat == {(key.group, key.keys[0]) for key in known} - {("", "api_key")}
    assert max(map(len, text.splitlines())) <= 120


def test_a_printed_job_reads_back_to_the_same_job(file: Path) -> None:
    options = [
        *(*DATASET, "--devices", "phone,laptop", "--cut", "phone=2,auto", "--rank", "phone=4,16", "--steps", "7"),
        *("--target-modules", "q_proj,v_proj", "--learning-rate", "1e-5", "--codec", "hidden=hadamard,int8;down=int4"),
        *("--text-column", "naïve: #1 'x'\n\t{", "--method", "dlora", "--active-fraction", "0.5", "--killed", "drop"),
    ]
    file.write_text(printed("finetune", *options))
    assert submitted("finetune", "--config", str(file)) == submitted("finetune", *options)


def test_a_printed_service_reads_back_to_the_same_service(file: Path) -> None:
    options = [
        *("--api-key", "secret-of-clients", "--stages", "laptop+desktop:0-2,cloud:2-6", "--adapter", "/a/formal"),
        *("--adapter", "brief=/a/b7", "--users", "phone", "--guests", "2", "--context", "100", "--wait", "5.5"),
    ]
    text = printed("serve", *options)
    assert "secret-of-clients" not in text
    file.write_text(text)
    assert submitted("serve", "--config", str(file), "--api-key", "secret-of-clients") == submitted("serve", *options)
    adapters = serving("--config", str(file)).adapters
    assert adapters == (AdapterConfig("formal", "/a/formal"), AdapterConfig("brief", "/a/b7"))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12))
def test_any_text_survives_the_file(name: str, file: Path) -> None:
    file.write_text(printed("finetune", f"--dataset={name}", f"--text-column={name}"), newline="")
    read = submitted("finetune", "--config", str(file))
    assert read.dataset == name
    assert TrainingConfig.from_json(read.training).text.text_column == name


def test_a_file_has_groups_lists_and_names(file: Path) -> None:
    file.write_text(
        """
dataset: 2024            # a number that is a name
steps: 20
devices:
  names: [phone, laptop]
  cut: phone=2,1
lora: {target_modules: [q_proj, v_proj], rank: auto}
optimizer: {name: sgd, learning_rate: 1e-3}
text:                    # a group of which nothing is chosen
dlora: {aggregate: true}
method: dlora
wait: 5
"""
    )
    spec = submitted("finetune", "--config", str(file))
    assert (spec.dataset, list(spec.devices), spec.wait_seconds) == ("2024", ["phone", "laptop"], 5)
    assert TrainingConfig.from_json(spec.training) == TrainingConfig.of(
        steps=20,
        cuts="phone=2,1",
        target_modules=("q_proj", "v_proj"),
        ranks="auto",
        optimizer="sgd",
        aggregate=True,
        method="dlora",
    )


def test_devices_may_be_named_without_their_group(file: Path) -> None:
    file.write_text("devices: 3\ndataset: notes\n")
    assert submitted("finetune", "--config", str(file)).device_count == 3
    file.write_text("devices: [phone, laptop]\ndataset: notes\n")
    assert list(submitted("finetune", "--config", str(file)).devices) == ["phone", "laptop"]


def test_the_command_line_wins_over_a_variable_over_the_file_over_the_default(file: Path) -> None:
    file.write_text("steps: 20\nbatch_size: 4\ndlora: {aggregate: true}\nmethod: dlora\ndataset: notes\n")
    read = training("--config", str(file), "--steps", "30", "--no-aggregate")
    assert read == TrainingConfig.of(steps=30, batch_size=4, method="dlora")
    assert training("--steps", "30", "--config", str(file)).dlora.aggregate
    file.write_text("api_key: of-the-file\n")
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv("ISTHMUS_API_KEY", raising=False)
        keys = [ServingConfig.from_json(submitted("serve", "--config", str(file)).serving).http.key_sha256]
        patched.setenv("ISTHMUS_API_KEY", "of-the-variable")
        keys += [ServingConfig.from_json(submitted("serve", "--config", str(file)).serving).http.key_sha256]
        keys += [serving("--config", str(file)).http.key_sha256]
    assert keys == [hashlib.sha256(key).hexdigest() for key in (b"of-the-file", b"of-the-variable", b"k")]


def test_print_config_does_nothing_else(file: Path) -> None:
    out = file.parent / "adapter"
    printed("finetune", "--method", "centralised", "--out", str(out), "--credentials", "/nowhere")
    assert not out.exists()
    printed("serve", "--credentials", "/nowhere")


def test_what_is_printed_has_been_checked() -> None:
    error = CliRunner().invoke(app, ["finetune", "--print-config", "--steps", "0"]).exception
    assert str(error) == "steps is 0; choose 1 or more"


BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in itertools.pairwise("abcdefghijklmnop"))


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("stepz: 1", "line 1: there is no setting 'stepz'; is steps meant?"),
        ("lora:\n  rang: 1", "line 2: there is no setting 'lora.rang'; is lora.rank meant?"),
        ("x" * 900 + ": 1", "line 1: there is no setting 'xxx"),
        ('"a\\nb": 1', r"there is no setting 'a\nb'"),
        ("config: x.yaml", "there is no setting 'config'"),
        ("<<: {steps: 1}", "there is no setting '<<'"),
        ("cut: 2", "line 1: cut belongs under devices"),
        ("lora: {steps: 2}", "steps belongs to no group"),
        ("steps: ten", "line 1: steps is 'ten'; it must be a whole number"),
        ('steps: "10"', "steps is '10'; it must be a whole number, without quotes"),
        ("steps: true", "steps is 'true'; it must be a whole number"),
        ("steps: 0x10", "steps is '0x10'; it must be a whole number"),
        ("steps: [1]", "steps must be a whole number"),
        ("steps:", "steps has no value: it must be a whole number"),
        ("steps: " + "9" * 5000, "it must be a whole number"),
        ("optimizer: {learning_rate: fast}", "optimizer.learning_rate is 'fast'; it must be a number"),
        ("wait: .nan", "wait is '.nan'; it must be a number"),
        ("wait: 0.5", "wait: 0.5 is not in the range"),
        ("detach: 1", "detach is '1'; it must be true or false"),
        ("dataset: {a: b}", "dataset must be text"),
        ("dataset: [a, b]", "dataset must be text"),
        ("data: [a, null]", "data must be text"),
        ("steps: 1\nsteps: 2", "line 2: steps is there twice"),
        ("lora: {rank: 1, rank: 2}", "lora.rank is there twice"),
        ("devices: {cut: 1, cut_layer: 2}", "devices.cut_layer is there twice"),
        ("lora: {rank: 1}\nlora: {alpha: 2}", "line 2: lora is there twice"),
        ("lora: 3", "lora is a group: write its settings under it"),
        ("[1, 2]", "line 1: write KEY: VALUE, a line each"),
        ("steps", "line 1: write KEY: VALUE, a line each"),
        ("? [a]\n: 1", "a key has to be a word"),
        ("steps: {", "line 1: this cannot be read as YAML"),
        ("steps: 1\n---\nsteps: 2", "a single document"),
        ("x: \x01", "cannot be read as YAML: unacceptable character"),
        ("steps: !!python/object/apply:os.system [ls]", "line 1: tags"),
        ("steps: !!int 1", "line 1: tags"),
        (BOMB, "line 1: anchors and aliases"),
        ("a: " + "[" * 20_000, "line 1: this is nested too deeply"),
        ("# " + "x" * MOST_BYTES, "is larger than 64 KiB"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else None,
)
def test_a_file_that_cannot_be_is_one_line_with_its_name(content: str, line: str, file: Path) -> None:
    file.write_text(content)
    with pytest.raises(BadRequest) as refused:
        submitted("finetune", "--config", str(file))
    text = str(refused.value)
    assert str(file) in text
    assert line in text
    assert len(text.splitlines()) == 1
    assert len(text) < len(str(file)) + 250


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe")
    for path, line in (
        (tmp_path / "none", "cannot be read: No such file or directory"),
        (tmp_path, "cannot be read: Is a directory"),
        (binary, "is not UTF-8 text"),
        (Path("/dev/zero"), "is larger than 64 KiB"),
    ):
        with pytest.raises(BadRequest, match=f"--config {path} {line}"):
            submitted("serve", "--config", str(path))


@pytest.mark.parametrize(
    ("program", "name"),
    [
        ("coordinator.cli.main", "finetune"),
        ("coordinator.cli.main", "serve"),
        ("coordinator.cli.main", ""),
        ("client.cli", "generate"),
    ],
)
def test_help_comes_without_torch_or_ray(program: str, name: str) -> None:
    script = (
        f"import sys, isthmus.{program} as cli\n"
        f"sys.argv = ['isthmus', *{name.split()!r}, '--help']\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "print([module for module in ('torch', 'transformers', 'ray', 'numpy') if module in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "Usage" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def all_commands() -> list[tuple[str, click.Command]]:
    from isthmus.client.cli import app as client

    found = []
    for program, one in (("isthmus", app), ("isthmus-client", client)):
        group = typer.main.get_command(one)
        assert isinstance(group, click.Group)
        found += [(f"{program} {name}", command) for name, command in group.commands.items()]
    return found


@pytest.mark.parametrize(("name", "one"), all_commands(), ids=[name for name, _ in all_commands()])
def test_every_command_has_an_example_and_help_of_80_columns(name: str, one: click.Command) -> None:
    from isthmus.client.cli import app as client

    program, word = name.split()
    result = CliRunner().invoke(app if program == "isthmus" else client, [word, "--help"], env={"COLUMNS": "80"})
    assert f"Example: {name}" in result.output
    assert max(map(len, result.output.splitlines())) <= 80


def test_the_tables_of_the_document_are_up_to_date() -> None:
    script = ROOT / "scripts" / "document_configuration.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_configuration_of_a_job_in_json_is_in_the_files_groups(file: Path) -> None:
    file.write_text("dataset: notes\nlora: {rank: 4}\nlink: {codec: int8}\n")
    values = json.loads(submitted("finetune", "--config", str(file)).training)
    assert (values["lora"]["rank"], values["link"]["codec"]) == (4, "int8")
