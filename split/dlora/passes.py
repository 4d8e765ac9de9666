"""A pass of the backbone as a conversation: a thread that computes, and the frames that it waits for."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable

from torch import Tensor

from isthmus.split.codecs.finite import DIVERGED, is_finite
from isthmus.split.data.sequences import seen_positions
from isthmus.split.dlora.backbone import Active, Backbone, Pass
from isthmus.split.errors import BadFrame, BadTensor, IsthmusError, LinkLost
from isthmus.split.link.frames import INPUT_GRADIENT, Frame, Phase
from isthmus.split.link.stage import Deliver
from isthmus.split.lora.sites import Layout, Site
from isthmus.split.training.frames import tensor_of, where_wanted

log = logging.getLogger(__name__)


class Passing:
    """One pass: a micro-batch forward and backward, or a held-out batch forward.

    `ended` is called once, in the pass's thread, with the error that ended it or None. It is not called if the device
    has gone.
    """

    def __init__(
        self,
        backbone: Backbone,
        layout: Layout,
        frame: Frame,
        active: Active,
        deliver: Deliver,
        ended: Callable[[IsthmusError | None], None],
    ) -> None:
        self.evaluating = frame.phase == Phase.EVALUATE
        self.number = frame.micro_batch
        self.result = frame  # at the end it is the answer that ends the pass
        self._layout = layout
        self._backbone, self._frame, self._deliver, self._ended = backbone, frame, deliver, ended
        seen = None if frame.wanted is None else seen_positions(frame.wanted)
        self._pass = Pass(layout.cut, active, seen, self._ask, backbone.turn, training=not self.evaluating)
        shape = tensor_of(frame).shape
        self._rows = shape[0] * shape[1] if self._pass.row_count is None else self._pass.row_count
        self._inbox: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()
        self._due: tuple[int, int, tuple[int, ...]] | None = None  # phase, site and shape of the frame that may come
        self._since = 0.0

    def start(self) -> None:
        threading.Thread(target=self._run, name=f"pass-{self.number}", daemon=True).start()

    def offer(self, frame: Frame) -> None:
        """Gives the pass a frame. Raises BadFrame for one that it does not wait for."""
        due = self._due
        if due is None or (frame.phase, frame.site) != due[:2] or tensor_of(frame).shape != due[2]:
            waits = "nothing" if due is None else f"{Phase.Name(due[0])} of site {due[1]}, {due[2]}"
            raise BadFrame(f"{Phase.Name(frame.phase)} of site {frame.site} of a micro-batch that waits for {waits}")
        self._due = None
        self._inbox.put(frame)

    def end(self) -> None:
        """Ends the pass of a device that has gone."""
        self._inbox.put(None)

    @property
    def waits_for(self) -> float:
        """Seconds for which the device has owed a frame; 0 if the pass waits for none."""
        return time.monotonic() - self._since if self._due is not None else 0.0

    def _run(self) -> None:
        try:
            self._go()
        except LinkLost:
            return  # whoever has ended the pass knows
        except IsthmusError as error:
            self._ended(error)
        except Exception as error:  # a bug, or no memory left: the device is told, and the others go on
            log.exception("a pass failed")
            self._ended(IsthmusError(f"the stage failed: {type(error).__name__}: {error}"))
        else:
            self._ended(None)

    def _go(self) -> None:
        frame, backbone, going = self._frame, self._backbone, self._pass
        hidden_states = tensor_of(frame)
        if self.evaluating:
            last = _checked(backbone.evaluate(going, hidden_states), "last hidden states")
            self.result = Frame(Phase.EVALUATE, frame.step, self.number, where_wanted(last, frame.wanted))
            return
        in_front = bool(going.active.trained & self._layout.front)
        last = _checked(backbone.forward(going, hidden_states, needs_gradient=in_front), "last hidden states")
        answer = Frame(Phase.FORWARD, frame.step, self.number, where_wanted(last, frame.wanted))
        gradient = backbone.backward(going, tensor_of(self._wait(answer, 0, tuple(last.shape), Phase.BACKWARD)))
        tensor = None if gradient is None else _checked(gradient.float(), "gradients at the cut")
        self.result = Frame(Phase.BACKWARD, frame.step, self.number, tensor)

    def _ask(self, site: Site, backward: bool, values: Tensor, wanted: bool) -> Tensor | None:
        phase = Phase.BACKWARD if backward else self._frame.phase
        flags = {INPUT_GRADIENT: float(wanted)} if backward else {}
        _checked(values, f"{'gradients' if backward else 'inputs'} of site {site.number}")
        asked = Frame(phase, self._frame.step, self.number, values, values=flags, site=site.number)
        if not wanted:
            self._deliver(asked)
            return None
        width = site.inputs if backward else site.outputs(self._pass.active.applied)
        return tensor_of(self._wait(asked, site.number, (self._rows, width), phase))

    def _wait(self, asked: Frame, site: int, shape: tuple[int, ...], phase: Phase) -> Frame:
        """Sends a frame and waits for the device's answer. Raises LinkLost if the device has gone."""
        self._since, self._due = time.monotonic(), (phase, site, shape)
        self._deliver(asked)
        frame = self._inbox.get()
        if frame is None:
            raise LinkLost("the device has gone")
        return frame


def _checked(values: Tensor, what: str) -> Tensor:
    """Raises BadTensor, which only the pass's device gets, for values that the device has made overflow."""
    if not is_finite(values):
        raise BadTensor(f"the {what} are not finite: {DIVERGED}")
    return values
