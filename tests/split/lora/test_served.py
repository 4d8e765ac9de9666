"""What an adapter adds is what peft adds; what cannot be served is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from isthmus.split.errors import BadModelFolder, BadRequest
from isthmus.split.job.config import TrainingConfig
from isthmus.split.lora.folder import AdapterFolder
from isthmus.split.lora.lora import add_lora, lora_config, lora_parameters, save_adapter
from isthmus.split.lora.served import LoraAdapter
from isthmus.split.models.blobs import Blobs, BlobStore
from isthmus.split.models.manifest import Manifest, build_manifest, read_blob, with_adapters
from isthmus.split.models.source import open_model
from isthmus.split.models.stage import StageSpec, build_stages
from tests.split.tiny_adapters import make_adapter, with_adapter
from tests.split.tiny_models import ARCHITECTURES, make_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make_model(tmp_path_factory.mktemp(name), name, layers=3) for name in ARCHITECTURES}


def opened(model: Path, adapter: Path) -> LoraAdapter:
    return LoraAdapter("mine", AdapterFolder(adapter), open_model(str(model)).config)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"r": 6, "lora_alpha": 3, "use_rslora": True},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
        {"target_modules": r".*\.1\.mlp\.(up|down)_proj"},
        {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 7}, "alpha_pattern": {"down_proj": 5, "0.*": 9}},
        {"rank_pattern": {"proj": 9, "^model.layers.2.self_attn.k_proj": 3}, "use_rslora": True},
        {"init_lora_weights": "gaussian", "lora_dropout": 0.1},
    ],
)
def test_modules_ranks_and_scales_are_pefts(models: dict[str, Path], tmp_path: Path, settings: dict[str, Any]) -> None:
    check(models["llama"], make_adapter(tmp_path / "adapter", models["llama"], **settings))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_linear_module_of_every_architecture(models: dict[str, Path], tmp_path: Path, architecture: str) -> None:
    check(models[architecture], make_adapter(tmp_path / "adapter", models[architecture]))


def check(model: Path, adapter: Path) -> None:
    """Against the modules that peft makes."""
    mine = opened(model, adapter)
    wanted = {
        name.removeprefix("base_model.model."): (
            module.lora_A["default"].weight,
            module.lora_B["default"].weight * module.scaling["default"],
        )
        for name, module in with_adapter(model, adapter).named_modules()
        if isinstance(module, LoraLayer)
    }
    got = mine.load(0, 3)
    assert got.keys() == wanted.keys() == mine.modules.keys()
    for module, (a, b) in wanted.items():
        torch.testing.assert_close(got[module].a, a)
        torch.testing.assert_close(got[module].b, b)
    assert mine.values(0, 3) == sum(a.numel() + b.numel() for a, b in wanted.values())
    assert mine.load(1, 2).keys() == {module for module in wanted if ".1." in module}
    assert sorted(mine.names(0, 1) + mine.names(1, 3)) == sorted(AdapterFolder(adapter).tensor_names())


@pytest.mark.parametrize("architecture", ["llama", "phi3", "gpt2"])
def test_what_a_job_exports_can_be_served(models: dict[str, Path], tmp_path: Path, architecture: str) -> None:
    source = open_model(str(models[architecture]))
    stage = build_stages(source, [StageSpec(0, 3, embeds=True, head=True)])[0]
    config = lora_config(TrainingConfig(), source.config)
    add_lora(stage, config, seed=0)
    tensors = {name: torch.randn(value.shape) for name, value in lora_parameters([stage]).items()}
    save_adapter(tmp_path / "adapter", tensors, config, str(source.path))
    check(models[architecture], tmp_path / "adapter")


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"use_dora": True}, "adapter mine has use_dora True, which cannot be served; train it without"),
        ({"modules_to_save": ["lm_head"]}, "has modules_to_save"),
        ({"bias": "lora_only"}, "has bias 'lora_only'"),
        ({"bias": "all"}, "has bias 'all'"),
        ({"lora_bias": True}, "has lora_bias True"),
        (
            {"target_modules": ["lm_head", "q_proj"]},
            r"has 'base_model.model.lm_head\.\S*; only lora_A and lora_B of the blocks' linear modules can be served",
        ),
        ({"target_modules": ["embed_tokens"]}, "has .*embed_tokens.*; only lora_A and lora_B"),
        ({"init_lora_weights": "pissa"}, "began with 'pissa', which changes the base model's weights"),
        ({"trainable_token_indices": [1, 2]}, "has trainable_token_indices"),
    ],
)
def test_what_is_more_than_lora_on_linear_modules_is_refused(
    models: dict[str, Path], tmp_path: Path, settings: dict[str, Any], line: str
) -> None:
    adapter = make_adapter(tmp_path / "adapter", models["llama"], **settings)
    with pytest.raises(BadRequest, match=line) as refused:
        opened(models["llama"], adapter)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"peft_type": "IA3"}, "is of type IA3; only LORA can be served"),
        ({"peft_type": None}, "is of type None"),
        ({"r": 8}, r"has A \(4, 64\) and B \(32, 4\) for model.layers.0.mlp.down_proj, which in this base with rank 8"),
        ({"r": 0}, "cannot be read"),
        ({"r": "many"}, "cannot be read"),
        ({"lora_alpha": None}, "cannot be read"),
        ({"lora_alpha": 1e999}, "cannot be read"),
        ({"rank_pattern": {"(": 1}}, "cannot be read"),
        ({"alpha_pattern": [1]}, "cannot be read"),
        ({"something_new": {"x": 1}}, "has something_new"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(
    models: dict[str, Path], tmp_path: Path, changes: dict[str, Any], line: str
) -> None:
    adapter = make_adapter(tmp_path / "adapter", models["llama"])
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(BadRequest, match=f"adapter mine .*{line}"):
        opened(models["llama"], adapter)


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_a_configuration_that_is_no_object_is_refused(models: dict[str, Path], tmp_path: Path, text: str) -> None:
    adapter = make_adapter(tmp_path / "adapter", models["llama"])
    (adapter / "adapter_config.json").write_text(text)
    with pytest.raises(BadRequest, match=r"has no valid adapter_config\.json"):
        opened(models["llama"], adapter)


def test_an_adapter_of_another_base_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    wider = make_model(tmp_path / "wider", "llama", layers=3, hidden=64)
    with pytest.raises(BadRequest, match="it is of another base model"):
        opened(models["llama"], make_adapter(tmp_path / "a", wider))
    deeper = make_model(tmp_path / "deeper", "llama", layers=4)
    with pytest.raises(BadRequest, match=r"changes 'model\.layers\.3.*the base model's 3 blocks"):
        opened(models["llama"], make_adapter(tmp_path / "b", deeper))
    with pytest.raises(BadRequest, match=r"changes 'model\.layers\.0\.mlp\.down_proj', which is not a linear module"):
        opened(models["gpt2"], make_adapter(tmp_path / "c", models["llama"]))


def test_tensors_that_cannot_be_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", models["llama"], target_modules=["q_proj"])
    path = adapter / "adapter_model.safetensors"
    good = load_file(path)
    name = min(good)
    for changed, line in (
        ({key: value for key, value in good.items() if key != name}, "only one of lora_A and lora_B"),
        (good | {name: good[name] * torch.nan}, "NaN or infinity in model.layers.0.self_attn.q_proj"),
        (good | {name: good[name].to(torch.int32)}, "it needs floats"),
    ):
        save_file(changed, path)
        with pytest.raises(BadRequest, match=line):
            opened(models["llama"], adapter).load(0, 3)


def test_a_folder_that_is_no_adapter_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BadModelFolder, match=r"has no adapter_config\.json"):
        AdapterFolder(models["llama"])
    with pytest.raises(BadModelFolder, match=r"has no adapter_config\.json"):
        AdapterFolder(tmp_path / "nowhere")
    adapter = make_adapter(tmp_path / "adapter", models["llama"])
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(BadModelFolder, match=r"has no adapter_model\.safetensors"):
        AdapterFolder(adapter)


def test_a_holders_digest_tells_adapters_their_order_and_their_scales_apart(
    models: dict[str, Path], tmp_path: Path
) -> None:
    folders = [make_adapter(tmp_path / str(seed), models["llama"], seed=seed) for seed in (1, 2)]
    one, other = (build_manifest(AdapterFolder(folder)) for folder in folders)
    path = folders[0] / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 9}))
    rescaled = build_manifest(AdapterFolder(folders[0]))
    lists = ([], [one], [other], [rescaled], [one, other], [other, one])
    assert len({with_adapters("base", adapters) for adapters in lists}) == len(lists)
    assert with_adapters("base", []) == "base"
    assert Manifest.from_proto(one.to_proto()) == one


def test_an_adapter_from_blobs_is_the_folders(models: dict[str, Path], tmp_path: Path) -> None:
    """As a device gets it: the tensors of its own blocks alone."""
    folder = AdapterFolder(make_adapter(tmp_path / "adapter", models["qwen2"]))
    whole = opened(models["qwen2"], folder.path)
    manifest = build_manifest(folder, whole.names(1, 3))
    store = BlobStore(tmp_path / "blobs")
    for blob in manifest.blobs():
        with store.writer(blob, 0) as writer:
            for chunk in read_blob(folder, manifest, blob.digest):
                writer.write(chunk)
    part = LoraAdapter("mine", Blobs(store, manifest), open_model(str(models["qwen2"])).config)
    got, wanted = part.load(1, 3), whole.load(1, 3)
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name].a, one.a) and torch.equal(got[name].b, one.b) for name, one in wanted.items())
    assert part.load(0, 1) == {}
