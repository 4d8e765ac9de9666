"""Memories `ef` and `delta`: what a sample's earlier coding leaves for its next one, in a bounded store."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from torch import Tensor

from isthmus.split.codecs.base import Keys
from isthmus.split.codecs.state import CodecState, Written, tensor_bytes
from isthmus.split.errors import CodecError

_MIB = 1 << 20
_Key = tuple[int, tuple[int, ...]]  # of a sample, and its shape


@dataclass
class _Store:
    """One tensor a sample and shape; those that were put longest ago are forgotten first."""

    tensors: OrderedDict[_Key, Tensor] = field(default_factory=OrderedDict)
    bytes: int = 0

    def get(self, keys: Keys, x: Tensor) -> list[Tensor | None]:
        """One for each sample of x, (batch, ...)."""
        found = [self.tensors.get(key) for key in _store_keys(keys, x)]
        return [None if tensor is None else tensor.to(x.device) for tensor in found]

    def put(self, keys: Keys, x: Tensor, limit: int) -> None:
        """limit: MiB; a sample that is there twice keeps the later tensor."""
        for key, tensor in zip(_store_keys(keys, x), _samples(x), strict=True):
            old = self.tensors.pop(key, None)
            self.tensors[key] = tensor.clone()
            self.bytes += tensor_bytes(tensor) - tensor_bytes(old)
            while self.bytes > limit * _MIB:
                _, oldest = self.tensors.popitem(last=False)
                self.bytes -= tensor_bytes(oldest)

    def written(self) -> Written:
        """In the order in which they were put."""
        return Written(tensors=tuple(((key,), tensor) for (key, _), tensor in self.tensors.items()))


def _read(name: str, limit: int, written: Written) -> _Store:
    """limit: MiB. Raises CodecError for what a store of this limit cannot have had."""
    store = _Store()
    for key, tensor in written.tensors:
        place = (key[0] if len(key) == 1 else -1, tuple(tensor.shape))
        if place[0] < 0 or place in store.tensors:
            raise CodecError(f"a state of {name} with a sample {key}")
        store.tensors[place] = tensor
        store.bytes += tensor_bytes(tensor)
    if store.bytes > limit * _MIB:
        raise CodecError(f"a state of {name} of {store.bytes} bytes; {limit} MiB can be")
    return store


@dataclass(frozen=True)
class ErrorFeedback:
    """Adds to a sample what its last coding lost, so that over the epochs nothing is lost (Seide et al. 2014).

    The residuals lie at the encoder only. limit: MiB of them; a forgotten one counts as zero.
    """

    limit: int = 256

    def __post_init__(self) -> None:
        _check("ef", self.limit)

    @property
    def name(self) -> str:
        return _name("ef", self.limit)

    def before(self, x: Tensor, keys: Keys, state: CodecState) -> Tensor:
        residuals = _store(self.name, state).get(keys, x)
        used = set[int]()
        given = _samples(x).clone()
        for sample, residual, key in zip(given, residuals, keys, strict=True):
            if residual is not None and key not in used:
                sample += residual
                used.add(key)
        return given.view(x.shape)

    def coded(self, given: Tensor, decoded: Tensor, keys: Keys, state: CodecState) -> None:
        lost = _samples(given - decoded)
        at: dict[int, int] = {}
        for i, key in enumerate(keys):  # of a sample that is there twice, both residuals are owed
            if key in at:
                lost[i] += lost[at[key]]
            at[key] = i
        _store(self.name, state).put(keys, lost, self.limit)

    def after(self, decoded: Tensor, keys: Keys, state: CodecState) -> Tensor:
        return decoded

    def read(self, written: Written) -> _Store:
        return _read(self.name, self.limit, written)


@dataclass(frozen=True)
class Delta:
    """Codes how a sample's tensor has changed since it came last (AQ-SGD: Wang et al. 2022, arXiv 2206.01299).

    The first time it is coded as it is. Both ends keep what was decoded, put in and forget in the same order, and so
    know the same samples. limit: MiB at each end, the same at both; a sample that is forgotten comes as if new.
    """

    limit: int = 256

    def __post_init__(self) -> None:
        _check("delta", self.limit)

    @property
    def name(self) -> str:
        return _name("delta", self.limit)

    def before(self, x: Tensor, keys: Keys, state: CodecState) -> Tensor:
        return self._with_known(x, keys, state, -1)

    def coded(self, given: Tensor, decoded: Tensor, keys: Keys, state: CodecState) -> None:
        self.after(decoded, keys, state)

    def after(self, decoded: Tensor, keys: Keys, state: CodecState) -> Tensor:
        whole = self._with_known(decoded, keys, state, 1)
        _store(self.name, state).put(keys, whole, self.limit)
        return whole

    def read(self, written: Written) -> _Store:
        return _read(self.name, self.limit, written)

    def _with_known(self, x: Tensor, keys: Keys, state: CodecState, factor: int) -> Tensor:
        """x plus or minus what is known of each sample. All is looked up before any is put: a sample that is there
        twice differs from the same tensor both times."""
        whole = _samples(x).clone()
        for sample, known in zip(whole, _store(self.name, state).get(keys, x), strict=True):
            if known is not None:
                sample += factor * known
        return whole.view(x.shape)


def _store(name: str, state: CodecState) -> _Store:
    store = state.parts.setdefault(name, _Store())
    assert isinstance(store, _Store)
    return store


def _samples(x: Tensor) -> Tensor:
    """A scalar is a batch of one."""
    return x if x.dim() else x.view(1)


def _store_keys(keys: Keys, x: Tensor) -> list[_Key]:
    return [(key, tuple(x.shape[1:])) for key in keys]


def _name(name: str, limit: int) -> str:
    return name if limit == 256 else f"{name}:limit={limit}"


def _check(name: str, limit: int) -> None:
    if limit < 1:
        raise CodecError(f"{name} with a limit of {limit} MiB: choose 1 or more")
