"""LoRA on a stage, by peft; its values as one flat vector; and the way out: an ordinary PEFT adapter folder.

Every module's initial values are drawn from the seed and the module's name in the whole model, so that a
stage starts with just the values that the same modules of the unsplit model start with.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PretrainedConfig

from isthmus.split.errors import BadRequest, BadTensor
from isthmus.split.job.config import TrainingConfig
from isthmus.split.lora.factors import Factors
from isthmus.split.models.architectures import architecture_of
from isthmus.split.models.stage import Stage

A, B = ".lora_A.weight", ".lora_B.weight"


def lora_config(training: TrainingConfig, model: PretrainedConfig, rank: int | None = None) -> LoraConfig:
    """The peft configuration that both sides, the yardstick and the exported folder share.

    rank: of a device that has another than the job's; the scale is the job's, so that products can be added up.
    """
    architecture = architecture_of(model)
    targets = training.lora.target_modules or architecture.default_targets
    unknown = sorted(set(targets) - set(architecture.linear_modules))
    if unknown:
        choices = ", ".join(architecture.linear_modules)
        raise BadRequest(f"target modules {', '.join(unknown)} are not in a {model.model_type} block; it has {choices}")
    settings = training.lora
    alpha = settings.alpha if rank in (None, settings.rank) else settings.scale * (rank or 0)
    return LoraConfig(
        r=rank or settings.rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft divides it by r; its annotation says int
        target_modules=list(targets),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        fan_in_fan_out=model.model_type == "gpt2",  # its linear layers are stored transposed (Conv1D)
    )


def add_lora(stage: Stage, config: LoraConfig, seed: int) -> None:
    """Puts LoRA modules into the stage's blocks, in place, with their values drawn from the seed.

    Those of a lower rank are the first rows of those of a higher one: the draw goes row by row.
    """
    if stage.spec.first == stage.spec.last:
        return
    inject_adapter_in_model(config, stage.model)
    draw_initial_values(((stage.global_name(name), module) for name, module in stage.model.named_modules()), seed)


def draw_initial_values(modules: Iterable[tuple[str, nn.Module]], seed: int) -> None:
    """A uniform as in LoRA's reference (Kaiming, a = sqrt 5), B zero; modules by their names in the whole model."""
    for name, module in modules:
        if not isinstance(module, LoraLayer):
            continue
        for lora_a, lora_b in zip(module.lora_A.values(), module.lora_B.values(), strict=True):
            assert isinstance(lora_a, nn.Linear)
            assert isinstance(lora_b, nn.Linear)
            lora_a.weight.data.copy_(_initial_a(name, lora_a.weight.shape, seed))
            nn.init.zeros_(lora_b.weight)


def initial_adapter(like: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The first values that `draw_initial_values` would give, for names (in the whole model) and shapes, without the
    model.
    """
    return {
        name: _initial_a(name.removesuffix(A), value.shape, seed) if name.endswith(A) else torch.zeros(value.shape)
        for name, value in like.items()
    }


def _initial_a(module: str, shape: torch.Size, seed: int) -> Tensor:
    digest = hashlib.sha256(f"{seed}:{module}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    values = torch.empty(shape)
    nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
    return values


def lora_parameters(stages: Sequence[Stage]) -> dict[str, nn.Parameter]:
    """The trainable parameters by their names in the whole model (`...q_proj.lora_A.weight`), in a fixed order."""
    found: dict[str, nn.Parameter] = {}
    for stage in stages:
        for name, parameter in stage.model.named_parameters():
            if ".lora_" in name:
                found[stage.global_name(name).replace(".default.", ".")] = parameter
    return dict(sorted(found.items()))


def shapes_of(parameters: Mapping[str, Tensor]) -> tuple[tuple[int, ...], ...]:
    """The shapes of tensors, in the mapping's order."""
    return tuple(tuple(value.shape) for value in parameters.values())


def flatten(parameters: Mapping[str, Tensor]) -> Tensor:
    """All values as one float32 vector on the CPU, in the mapping's order; (0,) for none."""
    if not parameters:
        return torch.empty(0)
    return torch.cat([value.detach().reshape(-1).to("cpu", torch.float32) for value in parameters.values()])


@torch.no_grad()
def load_flat(parameters: Mapping[str, Tensor], values: Tensor) -> None:
    """The reverse of `flatten`, in place; raises BadTensor when the lengths differ."""
    for parameter, part in zip(parameters.values(), unflatten(parameters, values).values(), strict=True):
        parameter.copy_(part)


def unflatten(like: Mapping[str, Tensor], values: Tensor) -> dict[str, Tensor]:
    """Cut a flat vector, (values,), into tensors of the names and shapes of `like`. Raises BadTensor for another
    length.
    """
    total = sum(value.numel() for value in like.values())
    if values.shape != (total,):
        raise BadTensor(f"an adapter of {values.numel()} values; this one has {total}")
    parts = torch.split(values, [value.numel() for value in like.values()]) if like else ()
    return {name: part.reshape(value.shape) for (name, value), part in zip(like.items(), parts, strict=True)}


def factors_of(values: Mapping[str, Tensor], module: str) -> Factors:
    """Take one module's factors out of an adapter's values by name, as float32 on the CPU."""
    a, b = values[module + A], values[module + B]
    return Factors(a.detach().to("cpu", torch.float32), b.detach().to("cpu", torch.float32))


def named_tensors(factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Give the factors of modules their names in an adapter."""
    return {
        name: value for module, one in factors.items() for name, value in ((module + A, one.a), (module + B, one.b))
    }


def save_adapter(folder: Path, tensors: Mapping[str, Tensor], config: LoraConfig, base_model: str) -> None:
    """Writes what `PeftModel.from_pretrained(base, folder)` loads. `folder` appears whole or not at all.

    Modules may have other ranks than the configuration's; the scale is that of the configuration for all.

    Raises OSError where `folder` is there already and not empty.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    named = {f"base_model.model.{name}": value.detach().to("cpu").contiguous() for name, value in tensors.items()}
    save_file(named, partial / "adapter_model.safetensors", metadata={"format": "pt"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns about a base that it cannot look up on the hub
        config.save_pretrained(str(partial))
    described = json.loads((partial / "adapter_config.json").read_text())
    described.update(base_model_name_or_path=base_model, inference_mode=True)
    ranks = {name.removesuffix(A): value.shape[0] for name, value in tensors.items() if name.endswith(A)}
    others = {module: rank for module, rank in sorted(ranks.items()) if rank != config.r}
    if others:
        described["rank_pattern"] = others
        described["alpha_pattern"] = {module: config.lora_alpha * rank / config.r for module, rank in others.items()}
    (partial / "adapter_config.json").write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")
    os.rename(partial, folder)  # over an empty folder, too; never over a file or what a folder holds
