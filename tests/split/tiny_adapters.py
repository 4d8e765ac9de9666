"""LoRA adapters for tiny models, made and computed by peft."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from isthmus.split.models.architectures import architecture_of
from isthmus.split.models.source import open_model
from tests.split.inference.whole import loaded_model


def make_adapter(folder: Path, model: Path, *, seed: int = 0, **settings: Any) -> Path:
    """Random values for LoRA on all linear modules, with rank 4, unless settings (of LoraConfig) say otherwise."""
    architecture = architecture_of(open_model(str(model)).config)
    chosen = {"r": 4, "lora_alpha": 8, "target_modules": list(architecture.linear_modules)} | settings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(loaded_model(model), LoraConfig(task_type="CAUSAL_LM", **chosen))
        generator = torch.Generator().manual_seed(seed)
        for name, value in adapted.named_parameters():
            if "lora_" in name:
                value.data.copy_(0.3 * torch.randn(value.shape, generator=generator))
        adapted.save_pretrained(str(folder))
    return folder


def with_adapter(model: Path, adapter: Path) -> Any:
    """The whole model with an adapter, as peft computes it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(loaded_model(model), str(adapter)).eval()
