"""The steps that are done, as watchers are told of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from isthmus.protos.v1.events_pb2 import Event, StepDone
from isthmus.split.job.events import Tell
from isthmus.split.link.frames import Frame


class JobProgress:
    """Counts a job's steps.

    step: the number of steps that the devices have done together.
    losses: mean losses of those steps, in nats.
    by_device: the number of steps that each device has told of, where devices have steps of their own.
    """

    def __init__(self, devices: Iterable[str], tell: Tell) -> None:
        self._tell = tell
        self.step = 0
        self.losses: list[float] = []
        self.by_device = dict.fromkeys(devices, 0)

    def go_to(self, step: int, losses: Iterable[float]) -> None:
        """Goes to the state after this step, as it was then."""
        self.step, self.losses = step, list(losses)

    def together(self, step: int, frames: Mapping[str, Frame]) -> None:
        """Notes a step that all devices at work have done, from their STEP frames."""
        self.step = step + 1
        tokens = sum(int(frame.values["tokens"]) for frame in frames.values())
        loss = sum(frame.values["nll"] for frame in frames.values()) / max(tokens, 1)
        self.losses.append(loss)
        self._tell(Event(step=StepDone(step=self.step, loss=loss, tokens=tokens, devices=sorted(frames))))

    def alone(self, device: str, frame: Frame) -> None:
        """Notes a step that one device has done by itself, from its STEP frame."""
        self.by_device[device] = frame.step + 1
        tokens = int(frame.values["tokens"])
        done = StepDone(
            step=min(self.by_device.values()),
            device_step=frame.step + 1,
            loss=frame.values["nll"] / max(tokens, 1),
            tokens=tokens,
            devices=[device],
        )
        self._tell(Event(device=device, step=done))
