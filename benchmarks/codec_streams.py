"""The tensors that a split training run sends, as they are before any codec."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from torch import Tensor

from isthmus.split.data.sequences import Sequences, batch_indices, sequences_of_file
from isthmus.split.data.stdlib_text import PRIVATE_MODULES, private_text
from isthmus.split.errors import BadData
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.streams import TRAINING, stream_of
from isthmus.split.link.device import LocalLink
from isthmus.split.link.frames import Frame
from isthmus.split.methods.local import train_locally
from isthmus.split.models.source import open_model


@dataclass(frozen=True)
class Passed:
    """One tensor of a stream, (batch, sequence, hidden), and the keys of its samples."""

    tensor: Tensor
    keys: list[int]


def capture(model: str, path: Path | None, config: TrainingConfig, sequences: int) -> dict[str, list[Passed]]:
    """Trains one device in this process, and gives what passed on each training stream, a tensor a step.

    path: of the text; none: the demo's first device's. sequences: of the text that are trained on, so that samples come
    again after that many.
    """
    source = open_model(model)
    tokenizer = source.tokenizer()
    if path is not None:
        train, _ = sequences_of_file(path, config.text, tokenizer)
    else:
        with tempfile.TemporaryDirectory(prefix="isthmus-bench-") as folder:
            text = Path(folder, "text.txt")
            text.write_text(private_text(PRIVATE_MODULES[0]))
            train, _ = sequences_of_file(text, config.text, tokenizer)
    if len(train) < min(sequences, config.batch_size):
        raise BadData(f"the text has {len(train)} sequences; give more of it, or a smaller --batch-size")
    train = Sequences(train.input_ids[:sequences], train.labels[:sequences])
    passed: dict[str, list[Passed]] = {stream: [] for stream in TRAINING}

    def take(frame: Frame, upward: bool) -> None:
        stream = stream_of(frame.phase, upward, config.devices.labels)
        if stream in passed and frame.tensor is not None:
            keys = batch_indices(len(train), config.batch_size, frame.step, config.seed)
            passed[stream].append(Passed(frame.tensor.detach().float().cpu().clone(), keys))

    class Watched(LocalLink):
        def send(self, frame: Frame) -> None:
            take(frame, True)
            super().send(frame)

        def receive(self) -> Frame:
            frame = super().receive()
            take(frame, False)
            return frame

    with patch("isthmus.split.methods.local.LocalLink", Watched):
        train_locally(source, config, [(train, None)])
    return passed
