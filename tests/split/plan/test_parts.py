"""What a job may ask for: what would not fit a message, or the model, is refused before anything is loaded."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig

from isthmus.split.errors import BadRequest
from isthmus.split.job.config import TrainingConfig
from isthmus.split.plan.parts import parts_of

LLAMA_8B = LlamaConfig(
    vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=8192,
)  # fmt: skip
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(
    ("training", "line"),
    [
        (TrainingConfig.of(sequence_length=8193), "sequence_length 8193 is more than this model's 8192"),
        (
            TrainingConfig.of(batch_size=4, sequence_length=1024),
            "hidden states of 64 MiB a step do not fit a message of 64 MiB; choose a smaller batch_size",
        ),
        (
            TrainingConfig.of(batch_size=1, cut_layer=4, rank=64, target_modules=ALL),
            "a device's adapter of 80 MiB does not fit a message of 64 MiB; choose a smaller rank",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_choose(training: TrainingConfig, line: str) -> None:
    with pytest.raises(BadRequest, match=line):
        parts_of(LLAMA_8B, training)


DLORA = TrainingConfig.of(method="dlora", batch_size=2, sequence_length=512, target_modules=ALL, validation_fraction=0)


@pytest.mark.parametrize("change", [{}, {"validation_fraction": 0.1, "micro_batches": 2}])
def test_modules_that_exchange_more_than_a_message_holds_are_refused(change: dict) -> None:
    """Gate and up give 2 x 14336 values a token; an evaluation's batches are not cut."""
    with pytest.raises(BadRequest, match=r"up to 112 MiB, does not fit a message of 64 MiB; choose .* target_modules"):
        parts_of(LLAMA_8B, DLORA.but(**change))


@pytest.mark.parametrize("change", [{"micro_batches": 2}, {"target_modules": ("q_proj", "v_proj")}])
def test_smaller_micro_batches_or_fewer_modules_make_them_fit(change: dict) -> None:
    parts_of(LLAMA_8B, DLORA.but(**change))


def test_an_adapter_that_stays_on_its_device_may_be_larger_than_a_message() -> None:
    config = DLORA.but(micro_batches=2, rank=16)
    parts_of(LLAMA_8B, config)
    with pytest.raises(BadRequest, match="a device's adapter of 160 MiB does not fit"):
        parts_of(LLAMA_8B, config.but(aggregate=True))


def test_the_adapter_has_the_values_of_the_devices_blocks_alone() -> None:
    parts = parts_of(
        LLAMA_8B, TrainingConfig.of(batch_size=1, cut_layer=2, rank=8, target_modules=("q_proj", "v_proj"))
    )
    assert sum(value.numel() for value in parts.adapter.values()) == 2 * 8 * (4096 + 4096 + 4096 + 1024)
    assert all(".layers.0." in name or ".layers.1." in name for name in parts.adapter)
