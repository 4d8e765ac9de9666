"""The adapters of a job at its stage: what each device has, how they become one, and who holds which blocks.

Where all devices are alike there is one average, the same bytes for all (averaging.py). Where they differ each one gets
its own part of what was merged (merging.py), and cuts may move (plan/moving.py). Called in the host's thread.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from isthmus.protos.v1 import stage_pb2
from isthmus.split.aggregation.averaging import Averager, Share
from isthmus.split.aggregation.merging import Merging
from isthmus.split.errors import WrongState
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.shapes import AVERAGE, Shape, as_plain
from isthmus.split.link.frames import Frame, Phase
from isthmus.split.link.profile import LinkProfile
from isthmus.split.lora.frozen import Frozen
from isthmus.split.lora.lora import A, flatten, shapes_of
from isthmus.split.models.stage import Stage
from isthmus.split.plan.choose import RECENT
from isthmus.split.plan.moving import Mover, Seen
from isthmus.split.training.checkpoint import Checkpoint
from isthmus.split.training.server import ServerTrainer

Segments = Callable[[Mapping[str, Shape]], list[Stage]]


class JobAdapters:
    """initial_adapter: of all devices, where they are alike; merging: where they are not. The rest as in StageHost."""

    def __init__(
        self,
        trainer: ServerTrainer,
        config: TrainingConfig,
        *,
        initial_adapter: Mapping[str, Tensor],
        merging: Merging | None,
        mover: Mover | None,
        segments: Segments | None,
        stage_digest: str | Mapping[int, str],
        tell: Callable[[str, str, dict[str, Any]], None],
    ) -> None:
        self._trainer, self._config, self._tell = trainer, config, tell
        self._initial = flatten(initial_adapter)
        self._averager = Averager(config, initial_adapter)
        self._merging, self._mover, self._segments = merging, mover, segments
        self._stage_digest = stage_digest
        self._recently = (0, 0.0)  # steps, and seconds of computing at the stage, at the last aggregation

    # ---- what a device has ----

    def values_of(self, device: str) -> int:
        """Length of its flattened adapter."""
        return self._merging.values_of(device) if self._merging else self._initial.numel()

    def shapes_for(self, device: str) -> tuple[tuple[int, ...], ...] | None:
        """Of the matrices of a device's adapter; None where they are the same for all."""
        if self._merging is None or device not in self._merging.shapes:
            return None
        return shapes_of(self._merging.like_of(self._merging.shapes[device]))

    def problem_with(self, device: str, opened: stage_pb2.Open) -> str:
        """Why a device that opens the job with this adapter and these files cannot take part; empty: it can."""
        shape = self._claimed(device, opened)
        if shape is not None and self._merging is not None:
            values = sum(value.numel() for value in self._merging.like_of(shape).values())
        else:
            values = self.values_of(device)
        if opened.adapter_values != values:
            whose = f"{device} has" if self._merging else "this job's devices have"
            return f"an adapter of {opened.adapter_values} values; {whose} {values}"
        digest = self._digest_of(shape)
        if digest and opened.stage_digest != digest:
            return "the device's model files differ from the coordinator's: their digests are not the same"
        return ""

    def has_moved(self, device: str, opened: stage_pb2.Open) -> bool:
        """Whether the device does not know yet where its cut is now."""
        claimed = self._claimed(device, opened)
        return self._merging is not None and claimed != self._merging.shapes[device]

    def start(self, device: str, point: Checkpoint, *, moved: bool) -> Frame:
        """What the answer to OPEN says of its adapter."""
        if self._merging is None:
            return Frame(Phase.OPEN, tensor=point.device_adapter)
        return self._with_adapter(Frame(Phase.OPEN, shape=self._merging.shapes[device] if moved else None), device)

    # ---- aggregation ----

    def merge(
        self, step: int, shares: Mapping[str, Share], point: Checkpoint
    ) -> tuple[Tensor | None, dict[str, Frame]]:
        """point: the last aggregation. The average, where all have one and the same, and the answers; watchers are told
        how exact it is."""
        average: Tensor | None = None
        if self._merging is None:
            total = sum(share.samples for share in shares.values())
            weighted = [(share.values, share.samples / total) for share in shares.values()]
            method, error = AVERAGE, self._averager.error(weighted, point.device_adapter)
            average, encoded = self._averager.average(weighted, point.device_adapter)
            answers = dict.fromkeys(shares, Frame(Phase.AGGREGATE, step, encoded=encoded))
        else:
            merged = self._merging.merge(shares, self._trainer.stepper.parameters)
            method, error = self._merging.name, merged.error
            self._trainer.take(merged.server, anew=self._config.starts_anew)
            here = {name: factors for name, factors in merged.server_frozen.items() if name + A in merged.server}
            self._trainer.frozen.take(Frozen(True, here))
            answers = {
                device: Frame(
                    Phase.AGGREGATE,
                    step,
                    encoded=encoded,
                    frozen=merged.frozen[device].to_proto() if device in merged.frozen else None,
                )
                for device, encoded in merged.answers.items()
            }
        self._tell("aggregation", "", {"step": step + 1, "method": method, "aggregation_error": error})
        return average, answers

    def move(self, step: int, measured: Mapping[str, stage_pb2.Measured], steps_timed: int) -> dict[str, Frame]:
        """Right after `merge`: other cuts for those of these devices that have clearly too much or too little to do;
        their answers. steps_timed: steps that this stage has computed in all."""
        work, (before, computed) = self._trainer.ledger.compute_by_work, self._recently
        computing = work["forward"] + work["backward"]
        self._recently = steps_timed, computing
        last = step + 1 == self._config.steps
        if self._mover is None or self._merging is None or last or steps_timed == before:
            return {}
        seen = {
            device: Seen(one.compute_seconds.get(RECENT, 0.0), LinkProfile.from_proto(one))
            for device, one in measured.items()
        }
        shapes = {device: self._merging.shapes[device] for device in sorted(measured)}
        moves = self._mover.look(shapes, seen, (computing - computed) / (steps_timed - before))
        for device, choice in moves.items():
            self._merging.move(device, choice.shape, self._trainer.stepper.parameters)
            data = choice.data(device)
            self._tell("shape", device, {**data, "message": f"after step {step + 1} {data['message']}"})
        if moves:
            self._rebuild(self._merging)
        return {
            device: self._with_adapter(Frame(Phase.AGGREGATE, step, shape=choice.shape), device)
            for device, choice in moves.items()
        }

    # ---- what lasts ----

    @property
    def digest(self) -> str:
        """Of the model files, for a checkpoint: of what devices hold with any of the cuts that they may have."""
        if isinstance(self._stage_digest, str):
            return self._stage_digest
        return hashlib.sha256("".join(digest for _, digest in sorted(self._stage_digest.items())).encode()).hexdigest()

    def into(self, point: Checkpoint) -> Checkpoint:
        """A checkpoint with what has to be known of devices that differ."""
        if self._merging is None:
            return point
        return replace(point, merged=self._merging.state(), shapes=as_plain(self._merging.shapes))

    def restore(self, point: Checkpoint) -> None:
        """Raises WrongState for a checkpoint of another model, of other options or of other devices."""
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

    def result(self, point: Checkpoint, server: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor] | None]:
        """The devices' average, flat; where they differ, the adapter of the whole model by name."""
        average = point.device_adapter
        if average is None:  # no device trains anything, or the job had no step
            average = self._initial
        return average, self._merging.result(server) if self._merging else None

    # ---- parts of it ----

    def _claimed(self, device: str, opened: stage_pb2.Open) -> Shape | None:
        """What a device holds as it opens the job: of one whose cut moves, maybe not yet what it is to hold."""
        if self._merging is None:
            return None
        current = self._merging.shapes[device]
        if self._mover is None or not opened.HasField("shape"):
            return current
        claimed = Shape(opened.shape.cut, opened.shape.rank)
        return claimed if claimed.rank == current.rank else current

    def _digest_of(self, shape: Shape | None) -> str:
        if isinstance(self._stage_digest, str):
            return self._stage_digest
        return self._stage_digest.get(shape.cut if shape else -1, "of no cut of this job")

    def _with_adapter(self, answer: Frame, device: str) -> Frame:
        """The adapter that a device is to have, and all of its frozen part."""
        assert self._merging is not None
        tensor, frozen = self._merging.start(device)
        return replace(answer, tensor=tensor, frozen=None if frozen is None else frozen.to_proto())

    def _rebuild(self, merging: Merging) -> None:
        """The server's segments for the shapes that there are now."""
        cuts = {device: shape.cut for device, shape in merging.shapes.items()}
        if set(cuts.values()) == set(self._trainer.cuts.values()) or self._segments is None:
            self._trainer.cuts = cuts
        else:
            self._trainer.rebuild(self._segments(merging.shapes), cuts, merging.server_values())
        if self._config.starts_anew:
            names = self._trainer.stepper.parameters
            values = {name: value for name, value in merging.server_values().items() if name in names}
            self._trainer.take(values, anew=True)
            self._trainer.frozen.take(Frozen(True, merging.frozen_of_server(names)))
