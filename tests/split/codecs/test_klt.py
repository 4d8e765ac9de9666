"""Transform `klt`: both ends have the same basis, it saves bits, and no bytes make one that is not orthonormal."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from isthmus.split.codecs.base import Codec, Transform
from isthmus.split.codecs.entropy import Range
from isthmus.split.codecs.klt import Klt
from isthmus.split.codecs.rotation import Hadamard
from isthmus.split.codecs.state import CodecState
from isthmus.split.codecs.uniform import Uniform
from isthmus.split.errors import CodecError


def correlated(rows: int, width: int, seed: int, mixing: int = 0, decay: float = 0.9) -> Tensor:
    """Rows that lie mostly in few directions; which, follows from `mixing`."""
    directions, _ = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(mixing)))
    factors = torch.randn(rows, width, generator=torch.Generator().manual_seed(1000 + seed))
    correlated: Tensor = (factors * decay ** torch.arange(width)) @ directions
    return correlated


def codec(transform: Transform | None, step: float = 0.13) -> Codec:
    return Codec("test", Uniform(step, "tensor"), Range(), transform)


def sent_basis(payload: bytes) -> bool:
    return payload[:4] != b"\0\0\0\0"


@pytest.mark.parametrize(
    ("width", "block"), [(64, 512), (96, 32), (60, 32), (31, 8)], ids=["one block", "three", "of 30", "of 1"]
)
def test_both_ends_agree_while_the_tensors_change(width: int, block: int) -> None:
    one = codec(Klt(block), 0.05)
    here, there = CodecState(1), CodecState(1)
    bases = 0
    for i in range(60):
        x = correlated(64, width, i, mixing=i // 30)
        payload = one.encode(x, here)
        assert len(payload) <= one.wire_bytes(x.shape)
        bases += sent_basis(payload)
        decoded = one.decode(payload, x.shape, there)
        assert (decoded - x).norm() < 0.02 * x.norm()
    assert bases >= 2 or block == 8


def test_a_new_basis_comes_only_when_it_pays() -> None:
    one, here = codec(Klt()), CodecState(1)
    sent = [sent_basis(one.encode(correlated(256, 64, i, mixing=i // 40), here)) for i in range(80)]
    assert sent[0]
    assert sum(sent[1:40]) <= 2
    assert any(sent[40:])
    noise, here = torch.Generator().manual_seed(2), CodecState(1)
    assert not any(sent_basis(one.encode(torch.randn(256, 64, generator=noise), here)) for _ in range(40))


def test_nothing_is_sent_before_enough_rows_have_come() -> None:
    one, here, there = codec(Klt()), CodecState(1), CodecState(1)
    first = None
    for i in range(60):
        x = correlated(4, 64, i)
        payload = one.encode(x, here)
        assert (one.decode(payload, x.shape, there) - x).norm() < 0.1 * x.norm()
        if first is None and sent_basis(payload):
            first = i
    assert first is not None
    assert first >= 3


def test_it_saves_bits_against_a_rotation_at_random() -> None:
    sizes = {}
    for transform in (Klt(), Hadamard()):
        one, here = codec(transform), CodecState(1)
        sizes[transform.name] = [len(one.encode(correlated(256, 128, i), here)) for i in range(6)][-1]
    assert sizes["klt"] < 0.6 * sizes["hadamard"]


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-8, 1e30])
def test_tensors_of_any_size_leave_the_transform_invertible(scale: float) -> None:
    transform, here, there = Klt(), CodecState(1), CodecState(1)
    for i in range(5):
        x = correlated(100, 48, i) * scale
        x[::3] = 0
        side, y = transform.forward(x, here)
        transform.receive(side, 48, there)
        back = transform.inverse(y, 48, there)
        assert (back - x).abs().max() <= 1e-5 * x.abs().max()
        assert torch.equal(transform.inverse(y, 48, here), back)


def test_another_width_begins_anew_at_both_ends() -> None:
    one, here, there = codec(Klt()), CodecState(1), CodecState(1)
    for i in range(12):
        x = correlated(128, (64, 32)[i // 3 % 2], i)
        decoded = one.decode(one.encode(x, here), x.shape, there)
        assert (decoded - x).norm() < 0.1 * x.norm()


def test_memory_stays_two_matrices() -> None:
    one, here = codec(Klt(32)), CodecState(1)
    for i in range(30):
        one.encode(correlated(64, 96, i), here)
    assert here.memory_bytes == 2 * 96 * 32 * 4


def test_bytes_that_are_no_basis_are_refused() -> None:
    transform = Klt()
    draw = np.random.default_rng(3)
    accepted = 0
    wrong = [b"x", bytes(16 * 16), b"\1" * 256, *(draw.bytes(256) for _ in range(50))]
    for side in wrong:
        state = CodecState(0)
        try:
            transform.receive(side, 16, state)
        except CodecError:
            continue
        accepted += 1
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(4))
        assert abs(transform.inverse(x, 16, state).norm() / x.norm() - 1) < 0.01
    assert accepted < len(wrong) - 2


def test_equal_tensors_give_equal_bytes() -> None:
    one = codec(Klt())
    runs = []
    for _ in range(2):
        state = CodecState(5)
        runs.append([one.encode(correlated(64, 64, i, mixing=i // 5), state) for i in range(10)])
    assert runs[0] == runs[1]


def test_names_and_parameters() -> None:
    assert Klt().name == "klt"
    assert Klt(64).name == "klt:block=64"
    assert Klt().side_bytes(768) == 768 * 384
    with pytest.raises(CodecError, match="choose"):
        Klt(0)
