"""Transform `klt`: the Karhunen-Loeve transform, learnt from the tensors that pass.

Hidden states and gradients lie mostly in few directions. In the basis of the eigenvectors of their second moments the
columns are uncorrelated, and most are so small that an entropy coder makes next to nothing of them. The encoder learns
the basis and sends it, as bytes, when that pays; both ends make the same orthonormal matrix of these bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from isthmus.split.codecs.state import CodecState, Written, tensor_bytes
from isthmus.split.errors import CodecError

_LASTS = 64  # tensors that the first basis is taken to be good for
_GAP, _LONGEST_GAP = 16, 64  # widths: of rows from a new basis to the first check of the next, and between later ones
_FORGET = 8  # widths: after that many rows, their weight in the moments is halved
_ROWS = 256  # of a tensor at most that are learnt from, once there is a basis
_NOISE = 2e-3  # of the mean variance: what the quantiser adds; variances below it save nothing
_ITERATIONS = 4  # of Newton and Schulz: from byte-sized errors to float32
_ORTHONORMAL = 1e-3


@dataclass
class _Learnt:
    """A basis that was learnt.

    basis: (blocks, block, block) float32 on the CPU, whose columns are the new axes; None: the identity.
    """

    width: int
    basis: Tensor | None = None
    moments: Tensor | None = None  # as basis: of rows of tensors scaled to an RMS of 1; only at the encoder
    weight: float = 0.0  # rows that they are of
    since_basis: int = 0  # rows
    since_check: int = 0  # rows
    gap: int = 0  # widths: of rows to let pass before the next check

    @property
    def bytes(self) -> int:
        return tensor_bytes(self.basis) + tensor_bytes(self.moments)

    def written(self) -> Written:
        kept = ((0, self.basis), (1, self.moments))
        numbers = (float(self.width), self.weight, float(self.since_basis), float(self.since_check), float(self.gap))
        return Written(numbers, tuple(((key,), tensor) for key, tensor in kept if tensor is not None))


@dataclass(frozen=True)
class Klt:
    """Blocks of up to `block` columns, all equal, have a basis each. It costs width * block bytes when it is sent.

    Memory: two matrices of width * block float32.
    """

    block: int = 512

    def __post_init__(self) -> None:
        if not 1 <= self.block <= 4096:
            raise CodecError(f"klt with blocks of {self.block}: choose 1 to 4096")

    @property
    def name(self) -> str:
        return "klt" if self.block == 512 else f"klt:block={self.block}"

    def forward(self, x: Tensor, state: CodecState) -> tuple[bytes, Tensor]:
        learnt = self._learnt(x.shape[1], state)
        side = self._learn(x, learnt)
        return side, _rotated(x, learnt.basis)

    def receive(self, side: bytes, width: int, state: CodecState) -> None:
        learnt = self._learnt(width, state)
        if not side:
            return
        if len(side) != self.side_bytes(width):
            raise CodecError(f"{len(side)} bytes of a basis; {self.side_bytes(width)} for a width of {width}")
        learnt.basis = _basis_from(side, width, self._block(width))

    def inverse(self, y: Tensor, width: int, state: CodecState) -> Tensor:
        basis = self._learnt(width, state).basis
        return y if basis is None else _rotated(y, basis.transpose(1, 2))

    def width(self, width: int) -> int:
        return width

    def side_bytes(self, width: int) -> int:
        return width * self._block(width)

    def read(self, written: Written) -> _Learnt:
        if len(written.numbers) != 5 or not all(0 <= number < 2**53 for number in written.numbers):
            raise CodecError(f"a state of {self.name} without its five numbers")
        width, weight, *counts = written.numbers
        tensors = dict(written.tensors)
        whole = all(number == int(number) for number in (width, *counts)) and width >= 1
        if not whole or len(tensors) != len(written.tensors) or not tensors.keys() <= {(0,), (1,)}:
            raise CodecError(f"a state of {self.name} for a width of {width}")
        learnt = _Learnt(int(width), tensors.get((0,)), tensors.get((1,)), weight, *map(int, counts))
        for tensor in tensors.values():
            block = tensor.shape[-1] if tensor.dim() == 3 else 0
            if not block or tensor.shape != (width // block, block, block) or block != self._block(learnt.width):
                raise CodecError(f"a state of {self.name} with a matrix of {tuple(tensor.shape)}")
        return learnt

    def _block(self, width: int) -> int:
        """The largest that divides the width."""
        return next(block for block in range(min(self.block, width), 0, -1) if width % block == 0)

    def _learnt(self, width: int, state: CodecState) -> _Learnt:
        """Tensors of another width begin anew, at both ends."""
        learnt = state.parts.get(self.name)
        if not isinstance(learnt, _Learnt) or learnt.width != width:
            learnt = state.parts[self.name] = _Learnt(width)
        return learnt

    def _learn(self, x: Tensor, learnt: _Learnt) -> bytes:
        """Takes in x, and gives the bytes of a new basis if there is to be one.

        It has to save its bytes within twice the time that the one before has been in use, as tensors that change fast
        make it useless fast; the first within _LASTS tensors such as x.
        """
        block = self._block(learnt.width)
        learnt.since_basis += len(x)
        learnt.since_check += len(x)
        scaled = _unit(x, _ROWS if learnt.gap else len(x))
        if scaled is None:
            return b""
        lasts = 2 * learnt.since_basis
        if learnt.basis is None:
            lasts = max(lasts, _LASTS * len(x))
        enough = learnt.weight + len(scaled) >= learnt.width / 4
        due = enough and learnt.since_check >= learnt.gap * learnt.width
        held_out = None
        if due and len(scaled) > 1:  # what a basis saves shows only on rows that it was not made from
            scaled, held_out = scaled[::2], scaled[1::2]
        _add(learnt, scaled, block)
        if held_out is None:
            return b""
        learnt.since_check = 0
        side = _to_bytes(learnt)
        try:
            basis = _basis_from(side, learnt.width, block)
        except CodecError:  # not near enough to orthonormal as bytes; that has not been seen
            return b""
        saved = (_bits(held_out, learnt.basis) - _bits(held_out, basis)) * lasts * learnt.width
        _add(learnt, held_out, block)
        if saved <= 8 * len(side):
            learnt.gap = min(max(2 * learnt.gap, 1), _LONGEST_GAP)
            return b""
        learnt.basis, learnt.since_basis, learnt.gap = basis, 0, _GAP
        return side


def _unit(x: Tensor, most: int) -> Tensor | None:
    """Evenly spaced rows, `most` or fewer, without those of zeros, scaled to an RMS of 1; none if none is left."""
    rows = x[:: -(-len(x) // most)]
    largest = rows.abs().amax(1)
    top = largest.max()
    if not top > 0:
        return None
    rows = rows[largest > 0] / top
    return rows / rows.square().mean().sqrt()


def _add(learnt: _Learnt, rows: Tensor, block: int) -> None:
    """Take in rows as `_unit` gives them."""
    keep = 0.5 ** (len(rows) / (_FORGET * learnt.width))
    cut = rows.view(len(rows), -1, block).transpose(0, 1)
    new = cut.transpose(1, 2) @ cut
    learnt.moments = new if learnt.moments is None else learnt.moments.to(new.device).mul_(keep).add_(new)
    learnt.weight = learnt.weight * keep + len(rows)


def _to_bytes(learnt: _Learnt) -> bytes:
    """Each eigenvector in steps of 1/127 of its largest entry; its length is known to be 1."""
    assert learnt.moments is not None
    _, vectors = torch.linalg.eigh(learnt.moments.cpu().double())
    vectors = vectors.flip(2)  # the largest first
    steps = vectors / vectors.abs().amax(1, keepdim=True) * 127
    return bytes(steps.round().to(torch.int8).numpy().tobytes())


def _basis_from(side: bytes, width: int, block: int) -> Tensor:
    """(blocks, block, block), orthonormal. Raises CodecError if the bytes are too far from that.

    The polar factor, by iteration (Higham 2008, Functions of Matrices, section 8.3): nearest to what was sent, and
    without the choice of signs that a QR or eigenvalue routine has.
    """
    steps = torch.from_numpy(np.frombuffer(side, dtype=np.int8).reshape(-1, block, block).copy())
    basis = steps.double()
    basis /= basis.norm(dim=1, keepdim=True)
    for _ in range(_ITERATIONS):
        basis = 1.5 * basis - 0.5 * basis @ (basis.transpose(1, 2) @ basis)
    error = (basis.transpose(1, 2) @ basis - torch.eye(block, dtype=torch.float64)).abs().max()
    if not error < _ORTHONORMAL:
        raise CodecError("a basis that is not orthonormal")
    return basis.float()


def _bits(rows: Tensor, basis: Tensor | None) -> float:
    """About what a value takes after the rotation, but for a constant."""
    variances = _rotated(rows, basis).square().mean(0)
    return float(0.5 * torch.log2(variances + _NOISE).mean())


def _rotated(x: Tensor, basis: Tensor | None) -> Tensor:
    """(rows, width) -> the same shape, block by block."""
    if basis is None:
        return x
    basis = basis.to(x.device)
    if len(basis) == 1:
        return x @ basis[0]
    cut = x.view(len(x), len(basis), -1).transpose(0, 1)
    return (cut @ basis).transpose(0, 1).reshape(x.shape)
