"""Decides when a job's plans are made anew, and from what: how each device's tensors are to cross."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.events import Tell, log_line
from isthmus.split.job.streams import stream_of
from isthmus.split.link.coding import Plan
from isthmus.split.link.frames import Frame
from isthmus.split.link.profile import LinkProfile
from isthmus.split.plan.choose import DeviceView, Planner
from isthmus.split.training.membership import JoinedDevice

_FIRST, _EVERY = 2, 8  # aggregations: the first ones after which plans are made anew, and then every so many


class Plans:
    """Makes the plans of a job's devices.

    hidden_size: the model's hidden size.
    together: whether devices do each step together, and so cut their batches alike.
    """

    def __init__(self, config: TrainingConfig, hidden_size: int, tell: Tell, *, together: bool) -> None:
        self._config, self._tell, self._together = config, tell, together
        self._planner = Planner(config, hidden_size)
        self._aggregations = 0

    def make(
        self,
        devices: Mapping[str, JoinedDevice],
        others: Sequence[JoinedDevice],
        stage_seconds: Mapping[str, float],
    ) -> dict[str, Plan]:
        """Makes plans, by device, and tells watchers what changes and why.

        devices: the devices to make plans for.
        others: further devices at work, which keep their plans.
        stage_seconds: seconds of `forward` and `backward` of a step at the stage; empty if not measured.
        """
        if self._together:
            return self._make(devices, stage_seconds, others[0].plan.micro_batches if others else None)
        return {name: self._make({name: device}, stage_seconds, None)[name] for name, device in devices.items()}

    def _make(
        self, devices: Mapping[str, JoinedDevice], stage_seconds: Mapping[str, float], micro_batches: int | None
    ) -> dict[str, Plan]:
        """Makes plans for devices that cut their batches alike.

        micro_batches: number of micro-batches of a step; None to choose it.
        """
        views = {name: DeviceView.of(one.families, one.measured, one.plan) for name, one in devices.items()}
        for name, device in devices.items():
            device.link = views[name].link
        plans, sentences = self._planner.plans(views, stage_seconds, micro_batches)
        for sentence in sentences:
            self._tell(log_line(sentence))
        return plans

    def is_due(self, devices: Iterable[JoinedDevice]) -> bool:
        """Whether plans are to be made after the next aggregation: now and then, or because a link has changed."""
        return self._comes or any(LinkProfile.from_proto(one.measured).differs(one.link) for one in devices)

    def aggregated(self) -> None:
        self._aggregations += 1

    def look_at(self, frame: Frame, *, upward: bool) -> None:
        """Shows the planner a tensor of the last step before plans are due."""
        done = frame.step + 1
        due = self._config.aggregates_after(done) and done < self._config.steps and self._comes
        if due and self._planner.automatic and frame.micro_batch == 0 and frame.tensor is not None:
            self._planner.look_at(stream_of(frame.phase, upward, self._config.devices.labels), frame.tensor)

    @property
    def _comes(self) -> bool:
        return self._aggregations < _FIRST or (self._aggregations + 1) % _EVERY == 0
