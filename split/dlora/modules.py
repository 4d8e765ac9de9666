"""The device's LoRA modules: A and B of those in the server's blocks, and which of all modules are active."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from isthmus.split.errors import BadTensor
from isthmus.split.job.groups import DROP, KEEP, MERGE
from isthmus.split.link.frames import Frame
from isthmus.split.lora.lora import flatten, initial_adapter
from isthmus.split.lora.sites import Layout, LoraModule, Site
from isthmus.split.models.stage import Stage

_Place = tuple[int, int]  # micro-batch, site


class RemoteModules:
    """The LoRA modules of the server's blocks, which compute what the server asks for.

    The inputs of a forward pass stay here until their backward pass.
    """

    def __init__(self, layout: Layout, seed: int, device: torch.device) -> None:
        self.layout, self._device = layout, device
        empty = {
            name: torch.empty(shape, device="meta")
            for number in sorted(layout.remote)
            for name, shape in layout.shapes(number).items()
        }
        self.parameters = {name: nn.Parameter(value.to(device)) for name, value in initial_adapter(empty, seed).items()}
        self._under_way: dict[_Place, tuple[Tensor, Tensor]] = {}

    def pair(self, module: LoraModule) -> tuple[nn.Parameter, nn.Parameter]:
        return tuple(self.parameters[name] for name in module.shapes(0))  # type: ignore[return-value]

    def outputs(self, site: Site, applied: frozenset[int], inputs: Tensor, *, keep_as: int | None = None) -> Tensor:
        """Computes what the applied modules of a site add, side by side: (rows, outputs).

        inputs: (rows, inputs).
        keep_as: the micro-batch whose backward pass will come; None if none will.
        """
        inputs = inputs.to(self._device)
        if keep_as is not None:
            inputs.requires_grad_()
        with torch.set_grad_enabled(keep_as is not None):
            outputs = torch.cat(list(self._added(site, applied, inputs)), dim=1)
        if keep_as is not None:
            self._under_way[keep_as, site.number] = inputs, outputs
        return outputs.detach()

    def _added(self, site: Site, applied: frozenset[int], inputs: Tensor) -> Iterable[Tensor]:
        for module in site.among(applied):
            a, b = self.pair(module)
            yield F.linear(F.linear(inputs, a), b) * self.layout.scale

    def backward(self, site: Site, micro_batch: int, gradients: Tensor, *, wanted: bool) -> Tensor | None:
        """Adds to the trained modules' gradients.

        gradients: by what `outputs` returned, (rows, outputs).
        wanted: whether the gradient by the inputs is wanted.

        Returns the gradient by the inputs, (rows, inputs), or None. Raises BadTensor for gradients that are not due.
        """
        inputs, outputs = self._under_way.pop((micro_batch, site.number), (None, None))
        if inputs is None or outputs is None or outputs.shape != gradients.shape:
            raise BadTensor(f"gradients for site {site.number} of micro-batch {micro_batch} that are not due")
        of = [value for module in site.modules for value in self.pair(module) if value.requires_grad]
        if wanted:
            of.append(inputs)  # type: ignore[arg-type]
        if of:
            outputs.backward(gradients.to(self._device, outputs.dtype), inputs=of)
        return inputs.grad if wanted else None

    def drop(self) -> None:
        """Forgets what a step that was cut off had under way."""
        self._under_way.clear()


class ActiveSet:
    """Which modules train, which ones the server asks for, and which ones it has merged."""

    def __init__(self, layout: Layout, parameters: Mapping[str, nn.Parameter], front: Stage, killed: str) -> None:
        """Begins with all modules active.

        parameters: the parameters of all modules, by names in the whole model.
        front: the device's first stage.
        killed: what becomes of killed modules: keep, merge or drop.
        """
        self.layout, self._killed = layout, killed
        self._pairs = {module.number: tuple(parameters[name] for name in module.shapes(0)) for module in layout.modules}
        names = {front.global_name(name): layer for name, layer in front.model.named_modules()}
        self._front = {
            number: layer
            for number in layout.front
            if isinstance(layer := names[layout.modules[number].name], LoraLayer)
        }
        self.trained = frozenset(self._pairs)
        self.applied = layout.remote  # modules that the server has to ask for
        self._sent: set[int] = set()  # modules that the server has merged in this session

    def train(self, numbers: frozenset[int]) -> None:
        """Makes these modules active and kills all others. A killed module keeps its values and moments."""
        self.trained = numbers
        self._sent -= numbers
        for number, pair in self._pairs.items():
            for value in pair:
                value.requires_grad_(number in numbers)
                value.grad = None
        # A killed module that has learnt nothing (its B is zero) adds nothing until it is revived, so it is not
        # exchanged.
        kept = filter(self._adds, self.layout.remote - numbers) if self._killed == KEEP else ()
        self.applied = (numbers & self.layout.remote).union(kept)
        if self._killed == DROP:
            for number, layer in self._front.items():
                layer._disable_adapters = number not in numbers

    def began(self) -> None:
        """Begins a session: the server knows of no merged module."""
        self._sent.clear()

    def to_merge(self) -> list[tuple[int, Tensor]]:
        """Numbers and values (A then B, flat) of killed modules that the server has to apply and does not have yet."""
        if self._killed != MERGE:
            return []
        due = [number for number in sorted(self.layout.remote - self.trained - self._sent) if self._adds(number)]
        self._sent.update(due)
        return [(number, flatten(dict(zip("AB", self._pairs[number], strict=True)))) for number in due]

    def dropped(self) -> list[str]:
        """Names of the B's that are zeros in the adapter: those of dropped modules."""
        if self._killed != DROP:
            return []
        gone = frozenset(self._pairs) - self.trained
        return [f"{name}.lora_B.weight" for name in self.layout.names(gone)]

    def _adds(self, number: int) -> bool:
        return bool(self._pairs[number][1].detach().any())


def asked_site(layout: Layout, frame: Frame, rows: int, width: int | None = None) -> tuple[Site, Tensor]:
    """The site of a frame from the server, and the frame's tensor, (rows, width).

    width: None for the width of the site's inputs.

    Raises BadFrame for an unknown site, and BadTensor for a tensor of another shape.
    """
    site = layout.site(frame.site)
    shape = (rows, site.inputs if width is None else width)
    if frame.tensor is None or frame.tensor.shape != shape:
        raise BadTensor(f"what the coordinator sent for site {frame.site} does not have the shape {shape}")
    return site, frame.tensor
