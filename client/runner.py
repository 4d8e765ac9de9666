"""Runs one task on this device, in its own thread: weights, then training over the link, or holding blocks."""

from __future__ import annotations

import logging
import secrets
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import grpc
import torch
from peft import LoraConfig
from torch import Tensor

from isthmus.client.identity import Identity
from isthmus.client.weights import device_source
from isthmus.protos.v1 import coordinator_pb2 as pb
from isthmus.protos.v1.coordinator_pb2_grpc import CoordinatorStub
from isthmus.split.data.sequences import Sequences, sequences_of_file
from isthmus.split.errors import IsthmusError, LinkLost, NotAllowed, NotFound
from isthmus.split.inference.holding import Holding
from isthmus.split.inference.serving import ServingConfig
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.shapes import Shape, asked
from isthmus.split.link.backoff import Backoff
from isthmus.split.link.device import GrpcLink
from isthmus.split.lora.lora import lora_config, save_adapter
from isthmus.split.lora.served import LoraAdapter
from isthmus.split.methods import METHODS, method_of
from isthmus.split.models.blobs import Blobs
from isthmus.split.models.precision import pick_device, pick_precision
from isthmus.split.models.source import TensorSource
from isthmus.split.models.stage import StageSpec
from isthmus.split.resources.ledger import Ledger
from isthmus.split.runtime.choose import RuntimeChoice, make_runtime
from isthmus.split.tls import channel, check_name, join_address, split_address
from isthmus.split.training.checkpoint import DeviceRecord
from isthmus.split.training.device import Cancelled, DeviceTrainer, Progress
from isthmus.split.training.device_steps import DeviceContext
from isthmus.split.training.method import DeviceResources

log = logging.getLogger(__name__)

State = pb.TaskState
LABELS_LEAVE = "labels-leave"  # permits jobs whose labels, which are the text, go to the coordinator
MODULES_LEAVE = "modules-leave"  # permits jobs in which what was learnt from the text goes there
SERVE = "serve"
ALLOWED = (*METHODS, LABELS_LEAVE, SERVE)  # unless the owner says otherwise
TASK_KINDS = (*ALLOWED, MODULES_LEAVE)
_FIRST_RETRY, _LAST_RETRY = 1.0, 20.0  # seconds up to which the first wait for the stage, and any wait, is drawn


@dataclass(frozen=True)
class DeviceOptions:
    """What the owner of this device decided."""

    state: Path
    data: Mapping[str, Path]  # files offered, under the owner's names
    models: Mapping[str, Path] = field(default_factory=dict)  # own copies, by a job's model or its folder's name
    allow: tuple[str, ...] = ALLOWED
    device: str = "auto"  # torch device
    threads: int = 0  # 0 for all cores
    slow_down: float = 1.0  # in training: emulates a device this many times slower


Tell = Callable[[pb.TaskState], None]


class Runner(threading.Thread):
    """A task under way. `tell` gets every change of its state, the last one included, in this thread."""

    def __init__(self, task: pb.Task, identity: Identity, options: DeviceOptions, tell: Tell) -> None:
        super().__init__(name=f"task-{task.id}", daemon=True)
        self.task = task
        self._identity, self._options, self._tell = identity, options, tell
        self._cancelled = threading.Event()
        self._stop: Callable[[], None] | None = None  # ends what is under way over the network

    def cancel(self) -> None:
        """Stops the task soon: at once if it waits for the link, else after its present computation."""
        self._cancelled.set()
        stop = self._stop
        if stop is not None:
            stop()

    def run(self) -> None:
        try:
            self._run()
            self._state(State.DONE)
        except IsthmusError as error:
            if self._cancelled.is_set():
                self._state(State.CANCELLED)
            else:
                log.error("task %s failed: %s", self.task.id, error)
                self._state(State.FAILED, str(error))
        except Exception as error:  # the daemon lives on, and the coordinator learns of it
            known = _known_failure(error)
            log.error("task %s failed: %s", self.task.id, known or error, exc_info=None if known else error)
            self._state(State.FAILED, known or f"a bug in the device's software: {type(error).__name__}: {error}")

    def _run(self) -> None:
        spec = self.task.spec
        check_name(self.task.id, "a task's id")
        check_name(self.task.job, "a job's id")  # it names this device's folder for the job
        if spec.method not in self._options.allow:
            raise NotAllowed(f"the owner of this device does not allow {spec.method} tasks")
        if self._options.threads:
            torch.set_num_threads(self._options.threads)
        if self._options.slow_down > 1:
            log.warning("job %s: emulating a device %g times slower", self.task.job, self._options.slow_down)
        if spec.method == SERVE:
            self._hold(ServingConfig.from_json(spec.serving))
        else:
            self._take_part(spec, TrainingConfig.from_json(spec.training))

    def _take_part(self, spec: pb.JobSpec, config: TrainingConfig) -> None:
        """Takes part in a training job. Raises NotAllowed for what the owner does not permit."""
        if spec.dataset not in self._options.data:
            raise NotFound(f"this device offers no dataset {spec.dataset!r}")
        data = self._options.data[spec.dataset]
        if config.devices.labels == "server":
            if LABELS_LEAVE not in self._options.allow:
                raise NotAllowed(
                    "the owner of this device keeps its labels: only jobs with --labels device may run here"
                )
            log.warning("job %s: labels go to the coordinator, which can read the text of %s", self.task.job, data.name)
        lets_out = method_of(config).lets_out(config)
        if lets_out and MODULES_LEAVE not in self._options.allow:
            raise NotAllowed(
                f"the owner of this device keeps what its modules learn: jobs with {lets_out} run "
                f"here with `isthmus-client run --allow {','.join(self._options.allow)},{MODULES_LEAVE}`"
            )
        source, _, digest = self._weights()
        self._state(State.PREPARING, "text")
        train, validation = sequences_of_file(data, config.text, source.tokenizer())
        trainer = self._trainer(source, digest, config, train, validation)
        self._state(State.RUNNING)
        traffic = trainer.ledger.traffic
        keep = partial(self._keep, lora_config(config, source.config, self._shape(config).rank or None))

        def train_over(stage: grpc.Channel, port: int) -> None:
            link = GrpcLink(stage, self.task.job, secrets.token_hex(8), trainer.terms, trainer.ledger, port=port)
            try:
                self._stoppable(link.close)
                trainer.run(link, cancelled=self._cancelled, tell=self._log_progress, keep=keep)
            finally:
                link.close()

        self._until_done(train_over, lambda: traffic.received("forward"))

    def _hold(self, serving: ServingConfig) -> None:
        """Holds blocks of a model that is served, until the job ends."""
        source, loras, digest = self._weights([adapter.name for adapter in serving.adapters])
        adapters = [
            LoraAdapter(one.name, lora, source.config) for one, lora in zip(serving.adapters, loras, strict=True)
        ]
        spec = StageSpec(self.task.first_block, self.task.last_block, embeds=False, head=False)
        choice = RuntimeChoice(
            serving.chain.runtime, serving.chain.weights, self._options.device, self._options.state / "onnx"
        )
        runtime = make_runtime(
            source,
            spec.first,
            spec.last,
            choice,
            sequences=serving.room,
            tokens=serving.limits.context,
            adapters=adapters,
        )
        self._state(State.RUNNING)
        batches, ledger = 0, Ledger()

        def hold_over(gateway: grpc.Channel, port: int) -> None:
            nonlocal batches
            hidden_size = source.config.hidden_size
            log.info("job %s: blocks %d-%d, for the gateway at port %d", self.task.job, spec.first, spec.last, port)
            holding = Holding(
                gateway, runtime, spec, job=self.task.job, digest=digest, hidden_size=hidden_size, ledger=ledger
            )
            self._stoppable(holding.leave)
            try:
                holding.run()
            finally:
                batches += holding.batches
            raise Cancelled("the task was cancelled")  # nothing else ends it well

        self._until_done(hold_over, lambda: batches)

    def _weights(self, adapters: Sequence[str] = (), *, cut: int = 0) -> tuple[TensorSource, list[Blobs], str]:
        """This device's part of the model, its parts of these adapters, and one digest of all their tensors.

        cut: the cut that the device moves to; 0 for its task's.
        """
        model = self.task.spec.model
        self._state(State.PREPARING, "weights")
        with channel(self._identity.address, self._identity.credentials) as control:
            return device_source(
                CoordinatorStub(control),
                self._identity.address,
                self.task.job,
                self._options.state,
                self._options.models.get(model) or self._options.models.get(Path(model).name),
                self._tell_download(),
                adapters=adapters,
                cut=cut,
            )

    def _trainer(
        self, source: TensorSource, digest: str, config: TrainingConfig, train: Sequences, validation: Sequences | None
    ) -> DeviceTrainer:
        device = pick_device(self._options.device)
        dtype = pick_precision(config.optimizer.precision, device)
        context = DeviceContext(config, train, validation, Ledger(slow_down=self._options.slow_down), dtype)

        def reload(cut: int) -> tuple[TensorSource, str]:
            moved, _, digest = self._weights(cut=cut)
            self._state(State.RUNNING)
            return moved, digest

        moves = asked(config)[0].automatic
        resources = DeviceResources(source, self._shape(config), device, reload if moves else None)
        steps = method_of(config).device_steps(context, resources)
        return DeviceTrainer(context, steps, record=DeviceRecord(self._folder), stage_digest=digest)

    @property
    def _folder(self) -> Path:
        """The folder of this job on this device."""
        return self._options.state / "jobs" / self.task.job

    def _keep(self, lora: LoraConfig, adapter: Mapping[str, Tensor]) -> None:
        """Writes this device's own adapter, which nobody else has. With rank 0 there is none."""
        if not adapter:
            return
        folder = self._folder / "adapter"
        shutil.rmtree(folder, ignore_errors=True)  # left by a run that ended before it could say so
        save_adapter(folder, adapter, lora, self.task.spec.model)
        log.info("job %s: this device's adapter is in %s", self.task.job, folder)

    def _shape(self, config: TrainingConfig) -> Shape:
        """What this device holds and trains, which a coordinator of an older version does not say."""
        if not self.task.HasField("shape"):
            return Shape(config.devices.cut_layer, config.lora.rank)
        return Shape(self.task.shape.cut, self.task.shape.rank)

    def _stoppable(self, stop: Callable[[], None]) -> None:
        self._stop = stop
        if self._cancelled.is_set():  # it was cancelled before there was anything to stop
            stop()

    def _until_done(self, once: Callable[[grpc.Channel, int], None], work_done: Callable[[], int]) -> None:
        """Calls `once` with a channel to the job's actor and its port, and dials a broken link again.

        work_done: a count that grows when a connection was useful, which makes the next wait short again.

        Raises Cancelled when the task is.
        """
        host, port = stage_address(self.task.stage_address, self._identity.host)
        backoff = Backoff(_FIRST_RETRY, _LAST_RETRY)
        while True:
            before = work_done()
            with channel(join_address(host, port), self._identity.credentials) as opened:
                try:
                    once(opened, port)
                    return
                except LinkLost as error:
                    lost = error
            if work_done() > before:
                backoff.reset()
            seconds = backoff.wait()
            if not self._cancelled.is_set():
                log.warning("job %s: %s; trying again in %.1f s", self.task.job, lost, seconds)
            if self._cancelled.wait(seconds):
                raise Cancelled("the task was cancelled")

    def _log_progress(self, progress: Progress) -> None:
        if progress.step % 10 == 0 or progress.step == progress.steps:
            log.info("job %s: step %d of %d, loss %.4f", self.task.job, progress.step, progress.steps, progress.loss)

    def _tell_download(self) -> Callable[[int, int], None]:
        last = -1

        def tell(here: int, total: int) -> None:
            nonlocal last
            if self._cancelled.is_set():
                raise Cancelled("the task was cancelled")
            percent = 100 * here // max(1, total)
            if percent // 10 > last // 10 or last < 0:
                last = percent
                self._state(State.PREPARING, f"weights {percent} % of {total / 2**20:.1f} MiB")

        return tell

    def _state(self, state: pb.TaskState.State, message: str = "") -> None:
        self._tell(pb.TaskState(task=self.task.id, state=state, message=message))


def _known_failure(error: Exception) -> str:
    """Describes a failure from a device's limits in words; empty for what only a bug does."""
    # torch has an error of its own for an accelerator that is full, and none for the processor's memory.
    full = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
    if full:
        return "this device has not enough memory for its part; choose a smaller cut or batch"
    if isinstance(error, OSError):
        return f"{error.filename or 'input or output'} on this device: {error.strerror or error}"
    return ""


def stage_address(address: str, coordinator_host: str) -> tuple[str, int]:
    """Splits HOST:PORT; an empty host stands for the one under which this device knows the coordinator."""
    if address.startswith(":"):
        return coordinator_host, int(address[1:])
    return split_address(address)
