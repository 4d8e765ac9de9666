"""DLoRA at the coordinator: the backbone's passes, their frames, and which modules are active where.

Each device has steps of its own. A pass, which is a micro-batch of a device on its way through the blocks, has its own
thread, and the thread waits where the device is asked. Nothing that a step changes is here, so a device that goes away
in the midst of an exchange takes nothing with it, and does the step anew. Only with `aggregate` do devices wait for
each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from torch import Tensor

from isthmus.protos.v1 import stage_pb2
from isthmus.protos.v1.events_pb2 import Event, ModulesChanged
from isthmus.split.aggregation.averager import Share
from isthmus.split.codecs.finite import DIVERGED, can_be_used
from isthmus.split.dlora.backbone import Active, Backbone
from isthmus.split.dlora.passes import Passing
from isthmus.split.errors import BadFrame, BadTensor, IsthmusError
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.events import log_line
from isthmus.split.job.groups import MERGE
from isthmus.split.link.frames import ENDS, EVALUATIONS_AHEAD, Frame, Phase
from isthmus.split.link.order import Order
from isthmus.split.lora.lora import shapes_of
from isthmus.split.lora.sites import Layout, adapter_of
from isthmus.split.training.averages import AggregationResult, Averages
from isthmus.split.training.checkpoint import Checkpoint
from isthmus.split.training.digests import check_holds, digest_of, digest_of_all
from isthmus.split.training.frames import tensor_of
from isthmus.split.training.membership import JoinedDevice, not_due
from isthmus.split.training.steps import HostSteps


@dataclass
class _OpenPasses:
    """What a device has under way.

    order: which of its frames are due, except those of a pass.
    passes: the passes under way, by (whether it evaluates, its number).
    merged: A and B of the modules that the stage applies, by number.
    trained: the modules that train in the step under way.
    """

    order: Order
    passes: dict[tuple[bool, int], Passing] = field(default_factory=dict)
    merged: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    trained: frozenset[int] = frozenset()

    @property
    def is_between_steps(self) -> bool:
        return self.order.between_steps and all(evaluating for evaluating, _ in self.passes)

    def takes(self, frame: Frame) -> bool:
        """Whether a frame that belongs to no pass may come while these passes are under way."""
        if frame.phase == Phase.FORWARD:
            return not any(evaluating for evaluating, _ in self.passes)
        if frame.phase == Phase.EVALUATE:
            free = (True, frame.micro_batch) not in self.passes and len(self.passes) <= EVALUATIONS_AHEAD
            return self.is_between_steps and free
        if frame.phase == Phase.MERGE or frame.values.get(ENDS):
            return self.is_between_steps
        return not self.passes

    def end(self) -> None:
        """Ends all passes of a device that has gone."""
        for passing in self.passes.values():
            passing.end()
        self.passes.clear()


class DloraHost(HostSteps):
    """DLoRA's steps at the coordinator.

    layouts: where the modules are, by device.
    initial: the adapter that an average begins with, by name.
    digests: digests of the model files that a device holds, by cut; empty if not known.
    """

    keeps_own = True

    def __init__(
        self,
        backbone: Backbone,
        config: TrainingConfig,
        layouts: Mapping[str, Layout],
        *,
        initial: Mapping[str, Tensor],
        digests: Mapping[int, str] = MappingProxyType({}),
    ) -> None:
        self.backbone, self.ledger, self.hidden_size = backbone, backbone.ledger, backbone.hidden_size
        self.config, self._layouts, self._digests = config, dict(layouts), dict(digests)
        self.digest = digest_of_all(digests)
        self._adapters = {device: shapes_of(adapter_of(layout)) for device, layout in layouts.items()}
        self._averages = Averages(config, initial)
        self._trained = {name: frozenset(range(len(one.modules))) for name, one in layouts.items()}  # as told last
        self._exchanges: dict[str, _OpenPasses] = {}

    # ---- devices ----

    def adapter_values(self, device: str) -> int:
        return sum(math.prod(shape) for shape in self._adapters[device])

    def adapter_shapes(self, device: str) -> tuple[tuple[int, ...], ...] | None:
        return self._adapters.get(device)

    def layout_for(self, device: str) -> Layout | None:
        return self._layouts.get(device)

    def check_open(self, device: str, opened: stage_pb2.Open) -> None:
        digest = digest_of(self._digests, self._layouts[device].cut)
        check_holds(opened, self.adapter_values(device), "this device has", digest)

    def begin(self, device: JoinedDevice) -> Frame:
        order = Order(self.config, device.name)
        self._exchanges[device.name] = _OpenPasses(order)
        if not self.config.averages and device.step - self.job.progress.by_device[device.name] == 1:
            device.step -= 1  # its STEP was lost with the link, and comes again
            order.repeat_step(device.step)
        else:
            order.admit(device.step)
        return super().begin(device)

    def left(self, device: JoinedDevice) -> None:
        exchange = self._exchanges.pop(device.name, None)
        if exchange is not None:
            exchange.end()

    def owed_by(self, device: JoinedDevice) -> float | None:
        passes = self._exchanges[device.name].passes
        return max(passing.waits_for for passing in passes.values()) if passes else None

    # ---- frames ----

    def check(self, device: JoinedDevice, frame: Frame) -> None:
        exchange, phase = self._exchanges[device.name], frame.phase
        if frame.site or phase == Phase.BACKWARD:
            return  # the pass that it belongs to knows whether it is due
        if not exchange.takes(frame):
            raise not_due(device.name, frame)
        order = exchange.order
        if phase in (Phase.EVALUATE, Phase.REPORT):
            order.check_evaluation(frame)
        elif phase == Phase.MERGE:
            if frame.step != order.step or self.config.dlora.killed != MERGE:
                raise not_due(device.name, frame)
        elif phase == Phase.CLOSE or frame.values.get(ENDS):
            super().check(device, frame)
            if phase == Phase.STEP:
                order.end()
        else:
            order.take(frame)

    def answered(self, device: JoinedDevice, frame: Frame) -> None:
        self._exchanges[device.name].order.answered(frame)

    def take(self, device: JoinedDevice, frame: Frame) -> None:
        exchange = self._exchanges[device.name]
        if frame.site or frame.phase == Phase.BACKWARD:
            passing = exchange.passes.get((frame.phase == Phase.EVALUATE, frame.micro_batch))
            if passing is None:
                raise not_due(device.name, frame)
            passing.offer(frame)
        elif frame.phase == Phase.MERGE:
            self._merge(device.name, exchange, frame)
        else:
            self._begin_pass(device, exchange, frame)

    def _begin_pass(self, device: JoinedDevice, exchange: _OpenPasses, frame: Frame) -> None:
        evaluating = frame.phase == Phase.EVALUATE
        active = self._active(device.name, exchange, frame)

        def ended(error: IsthmusError | None) -> None:  # in the pass's thread
            self.put(lambda: self._ended(device, exchange, passing, error))

        passing = Passing(self.backbone, self._layouts[device.name], frame, active, device.deliver, ended)
        exchange.passes[evaluating, frame.micro_batch] = passing
        passing.start()

    def _active(self, device: str, exchange: _OpenPasses, frame: Frame) -> Active:
        """What a pass's frame says of the modules. Raises BadFrame for what cannot be."""
        layout = self._layouts[device]
        applied = layout.unpack(frame.applied)
        if not applied <= layout.remote:
            raise BadFrame("modules of the device's own blocks are not asked for")
        if frame.phase == Phase.EVALUATE:
            return Active(frozenset(), applied, dict(exchange.merged))
        trained = layout.unpack(frame.trained)
        if not trained & layout.remote <= applied:
            raise BadFrame("modules that train and are not asked for")
        if not frame.micro_batch:
            exchange.trained = trained
        if trained != exchange.trained:
            raise BadFrame("micro-batches of one step that train different modules")
        self._tell_modules(device, frame.step, trained)
        for number in trained & exchange.merged.keys():
            del exchange.merged[number]
        if applied & exchange.merged.keys():
            raise BadFrame("modules that are merged and to be asked for")
        return Active(trained, applied, dict(exchange.merged))

    def _merge(self, device: str, exchange: _OpenPasses, frame: Frame) -> None:
        """Takes the modules that the stage has to apply itself from here on.

        Raises BadFrame for modules in the device's own blocks, and BadTensor for values that cannot be used.
        """
        layout = self._layouts[device]
        numbers = layout.unpack(frame.trained)
        if not numbers or not numbers <= layout.remote:
            raise BadFrame("MERGE of no module, or of one in the device's own blocks")
        values = tensor_of(frame)
        if not can_be_used([values]):
            raise BadTensor(f"MERGE of values that float32 cannot use: {DIVERGED}")
        for number in sorted(numbers):
            parts = []
            for shape in layout.shapes(number).values():
                size = shape[0] * shape[1]
                parts.append(values[:size].reshape(shape))
                values = values[size:]
            exchange.merged[number] = parts[0], parts[1]

    def _ended(self, device: JoinedDevice, exchange: _OpenPasses, passing: Passing, error: IsthmusError | None) -> None:
        key = passing.evaluating, passing.number
        if exchange.passes.get(key) is not passing:
            return
        del exchange.passes[key]
        if error is not None:
            self.job.put_out(device, error)
            return
        if not passing.evaluating:
            exchange.order.passed()
        self.job.answer(device.name, passing.result)

    def stepped(self, device: JoinedDevice, frame: Frame) -> None:
        if frame.values.get(ENDS):
            self._tell_modules(device.name, frame.step, frozenset())
            line = f"{device.name}: after step {frame.step} no module is left that trains: its training has ended"
            self.job.tell(log_line(line, device.name))

    def _tell_modules(self, device: str, step: int, trained: frozenset[int]) -> None:
        layout = self._layouts[device]
        before, self._trained[device] = self._trained[device], trained
        killed, revived = before - trained, trained - before
        if killed or revived:
            of = f"{len(trained)} of {len(layout.modules)} active"
            message = f"{len(killed)} modules killed, {len(revived)} revived; {of}"
            changed = ModulesChanged(
                step=step,
                killed=layout.names(killed),
                revived=layout.names(revived),
                active=layout.names(trained),
                message=message,
            )
            self.job.tell(Event(device=device, modules=changed))

    # ---- aggregation ----

    def unfit(self, shares: Mapping[str, Share], last: Tensor | None) -> set[str]:
        return self._averages.unfit(shares, last)

    def aggregate(self, step: int, shares: Mapping[str, Share], last: Tensor | None) -> AggregationResult:
        return self._averages.aggregate(step, shares, last)

    def adapter(self, point: Checkpoint) -> dict[str, Tensor] | None:
        return None if point.device_adapter is None else self._averages.named(point.device_adapter)
