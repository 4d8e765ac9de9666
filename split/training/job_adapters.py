"""The adapters of a job at its stage: what each device has, how they become one, and who holds which blocks.

Where all devices are alike there is one average, the same bytes for all (averages.py). Where they differ each device
gets its own part of what was merged (aggregation/merger.py), and cuts may move (plan/cut_mover.py). All of it is called
in the host's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from torch import Tensor

from isthmus.protos.v1 import stage_pb2
from isthmus.split.aggregation.averager import Share
from isthmus.split.aggregation.merger import Merger
from isthmus.split.errors import WrongState
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.shapes import Shape, as_plain
from isthmus.split.link.frames import Frame, Phase
from isthmus.split.link.profile import LinkProfile
from isthmus.split.lora.frozen import Frozen
from isthmus.split.lora.lora import A, shapes_of
from isthmus.split.models.stage import Stage
from isthmus.split.plan.choose import RECENT
from isthmus.split.plan.cut_mover import CutMover, MeasuredDevice
from isthmus.split.plan.shapes import ShapeChoice
from isthmus.split.training.averages import AggregationResult, Averages
from isthmus.split.training.checkpoint import Checkpoint
from isthmus.split.training.digests import check_holds, digest_of, digest_of_all
from isthmus.split.training.server import ServerTrainer

Segments = Callable[[Mapping[str, Shape]], list[Stage]]


@dataclass(frozen=True)
class Moving:
    """What moves cuts in the midst of a job.

    mover: decides when cuts move.
    segments: makes the stage's segments for other shapes.
    """

    mover: CutMover
    segments: Segments


class JobAdapters:
    """The adapters of a job's devices.

    trainer: the stage's blocks.
    initial: the adapter that every device begins with, where all are alike.
    merging: merges the adapters of devices that differ; None where all are alike.
    moving: None where cuts stay.
    digests: digests of the model files that a device holds, by cut; empty if not known.
    """

    def __init__(
        self,
        trainer: ServerTrainer,
        config: TrainingConfig,
        initial: Mapping[str, Tensor],
        *,
        merging: Merger | None = None,
        moving: Moving | None = None,
        digests: Mapping[int, str] = MappingProxyType({}),
    ) -> None:
        self._trainer, self._config = trainer, config
        self._averages = Averages(config, initial)
        self._merging, self._moving, self._digests = merging, moving, dict(digests)
        self._recently = (0, 0.0)  # steps, and the stage's seconds of computing, at the last aggregation

    # ---- what a device has ----

    def values_of(self, device: str) -> int:
        """Length of a device's flattened adapter."""
        return self._merging.values_of(device) if self._merging else self._averages.initial.numel()

    def shapes_for(self, device: str) -> tuple[tuple[int, ...], ...] | None:
        """Shapes of the matrices of a device's adapter; None for a device that has no part in the job."""
        if self._merging is None:
            return self._averages.shapes
        if device not in self._merging.shapes:
            return None
        return shapes_of(self._merging.layout.like_of(self._merging.shapes[device]))

    def check_open(self, device: str, opened: stage_pb2.Open) -> None:
        """Raises BadFrame for a device with another adapter, or other files, than it has to have."""
        shape = self._claimed(device, opened)
        if shape is not None and self._merging is not None:
            values = sum(value.numel() for value in self._merging.layout.like_of(shape).values())
        else:
            values = self.values_of(device)
        whose = f"{device} has" if self._merging else "this job's devices have"
        cut = self._config.devices.cut_layer if shape is None else shape.cut
        check_holds(opened, values, whose, digest_of(self._digests, cut))

    def start(self, device: str, opened: stage_pb2.Open, point: Checkpoint) -> Frame:
        """The answer to OPEN: the device's adapter, and its shape if its cut has moved without its knowledge."""
        if self._merging is None:
            return Frame(Phase.OPEN, tensor=point.device_adapter)
        shape = self._merging.shapes[device]
        moved = self._claimed(device, opened) != shape
        return self._with_adapter(Frame(Phase.OPEN, shape=shape if moved else None), device)

    # ---- aggregation ----

    def unfit(self, shares: Mapping[str, Share], last: Tensor | None) -> set[str]:
        """The devices whose adapters nobody could compute with: NaN, infinity, or values so large that they lead there.

        last: the average before, flat; None if there was none.
        """
        return self._merging.unfit(shares) if self._merging else self._averages.unfit(shares, last)

    def merge(self, step: int, shares: Mapping[str, Share], last: Tensor | None) -> AggregationResult:
        """Makes one adapter of the devices' adapters, and the answers to their AGGREGATE frames.

        last: the average of the last aggregation, flat, where all devices have the same.
        """
        if self._merging is None:
            return self._averages.aggregate(step, shares, last)
        merged = self._merging.merge(shares, self._trainer.stepper.parameters)
        self._trainer.take(merged.server, anew=self._config.starts_anew)
        here = {name: factors for name, factors in merged.server_frozen.items() if name + A in merged.server}
        self._trainer.frozen.take(Frozen(True, here))
        answers = {}
        for device, encoded in merged.answers.items():
            frozen = merged.frozen[device].to_proto() if device in merged.frozen else None
            answers[device] = Frame(Phase.AGGREGATE, step, encoded=encoded, frozen=frozen)
        return AggregationResult(None, answers, self._merging.method.name, merged.error)

    def move(
        self, step: int, measured: Mapping[str, stage_pb2.Measured], steps_timed: int
    ) -> tuple[dict[str, ShapeChoice], dict[str, Frame]]:
        """Moves the cuts of devices that have clearly too much or too little to do. It is called right after `merge`.

        measured: what each device has measured, by device.
        steps_timed: number of steps that this stage has computed in all.

        Returns the new shapes and the answers that tell them, both by device.
        """
        work, (before, computed) = self._trainer.ledger.compute_by_work, self._recently
        computing = work["forward"] + work["backward"]
        self._recently = steps_timed, computing
        last = step + 1 == self._config.steps
        if self._moving is None or self._merging is None or last or steps_timed == before:
            return {}, {}
        seen = {
            device: MeasuredDevice(one.compute_seconds.get(RECENT, 0.0), LinkProfile.from_proto(one))
            for device, one in measured.items()
        }
        shapes = {device: self._merging.shapes[device] for device in sorted(measured)}
        moves = self._moving.mover.look(shapes, seen, (computing - computed) / (steps_timed - before))
        for device, choice in moves.items():
            self._merging.move(device, choice.shape, self._trainer.stepper.parameters)
        if moves:
            self._rebuild(self._merging)
        answers = {
            device: self._with_adapter(Frame(Phase.AGGREGATE, step, shape=choice.shape), device)
            for device, choice in moves.items()
        }
        return moves, answers

    # ---- what lasts ----

    @property
    def digest(self) -> str:
        """One digest of the model files with all cuts that devices may have, for a checkpoint."""
        return digest_of_all(self._digests)

    def into(self, point: Checkpoint) -> Checkpoint:
        """Adds to a checkpoint what has to be known of devices that differ."""
        if self._merging is None:
            return point
        return replace(point, merged=self._merging.state(), shapes=as_plain(self._merging.shapes))

    def restore(self, point: Checkpoint) -> None:
        """Takes over a checkpoint. Raises WrongState for one of another model, of other options or of other devices."""
        if bool(point.merged) != (self._merging is not None):
            before, now = ("differed", "are alike") if point.merged else ("were alike", "differ")
            raise WrongState(
                f"the checkpoint is of devices that {before}, and these {now}: resume the job with those that it had"
            )
        if self._merging is None:
            self._trainer.restore(point.server, point.optimizer)
            return
        self._merging.load(point.merged)
        names = self._trainer.stepper.parameters.keys()
        known = {**self._merging.server_values(), **point.server}
        state = {key: value for key, value in point.optimizer.items() if key.rpartition("|")[0] in names}
        self._trainer.restore({name: value for name, value in known.items() if name in names}, state)
        self._trainer.frozen.take(Frozen(True, self._merging.frozen_of_server(self._trainer.stepper.parameters)))

    def result(self, point: Checkpoint) -> dict[str, Tensor]:
        """The adapter of the whole model, by name."""
        if self._merging is not None:
            return self._merging.result(point.server)
        return {**self._averages.named(point.device_adapter), **point.server}

    # ---- parts of it ----

    def _claimed(self, device: str, opened: stage_pb2.Open) -> Shape | None:
        """The shape that a device holds as it opens the job, which may lag behind the one to hold after a move."""
        if self._merging is None:
            return None
        current = self._merging.shapes[device]
        if self._moving is None or not opened.HasField("shape"):
            return current
        claimed = Shape(opened.shape.cut, opened.shape.rank)
        return claimed if claimed.rank == current.rank else current

    def _with_adapter(self, answer: Frame, device: str) -> Frame:
        """Adds to an answer the adapter that a device is to have, and its whole frozen part."""
        assert self._merging is not None
        tensor, frozen = self._merging.start(device)
        return replace(answer, tensor=tensor, frozen=None if frozen is None else frozen.to_proto())

    def _rebuild(self, merging: Merger) -> None:
        """Makes the server's segments for the devices' current shapes."""
        cuts = {device: shape.cut for device, shape in merging.shapes.items()}
        if set(cuts.values()) == set(self._trainer.cuts.values()) or self._moving is None:
            self._trainer.cuts = cuts
        else:
            self._trainer.rebuild(self._moving.segments(merging.shapes), cuts, merging.server_values())
        if self._config.starts_anew:
            names = self._trainer.stepper.parameters
            values = {name: value for name, value in merging.server_values().items() if name in names}
            self._trainer.take(values, anew=True)
            self._trainer.frozen.take(Frozen(True, merging.frozen_of_server(names)))
