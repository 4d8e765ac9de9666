"""A stage computes exactly what its part of the unsplit model computes, and has nothing of the other parts."""

from __future__ import annotations

import functools
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from isthmus.split.errors import BadModelFolder, BadRequest, UnsupportedModel
from isthmus.split.models.architectures import architecture_of
from isthmus.split.models.source import ModelFolder
from isthmus.split.models.stage import Stage, StageSpec, build_stages, cut_in_two, cut_u_shaped
from tests.split.tiny_models import ARCHITECTURES, VOCABULARY, change_config, make_config, make_model

LAYERS = 6
MakeModel = Callable[..., Path]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """make_model, each model once: (architecture, tied, …settings) -> its folder."""

    @functools.cache
    def make(architecture: str, **settings: Any) -> Path:
        return make_model(tmp_path_factory.mktemp(architecture), architecture, **settings)

    return lambda architecture, **settings: make(architecture, **settings)


def whole_model(folder: Path) -> Any:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def token_ids(batch: int = 2, length: int = 20, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def chain(bounds: Sequence[int]) -> list[StageSpec]:
    """Stages between consecutive bounds; the first embeds, the last has the head."""
    return [
        StageSpec(first, last, embeds=place == 0, head=place == len(bounds) - 2)
        for place, (first, last) in enumerate(itertools.pairwise(bounds))
    ]


def run(stages: Sequence[Stage], x: Tensor, caches: Sequence[transformers.DynamicCache] | None = None) -> Tensor:
    with torch.no_grad():
        for place, stage in enumerate(stages):
            x = stage(x, cache=caches[place] if caches else None)
    return x


def difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


all_models = pytest.mark.parametrize(
    ("architecture", "tied"), [(architecture, tied) for architecture in ARCHITECTURES for tied in (False, True)]
)


@all_models
def test_every_cut_in_two_gives_the_unsplit_logits(model_folder: MakeModel, architecture: str, tied: bool) -> None:
    folder = model_folder(architecture, tied=tied)
    ids = token_ids()
    with torch.no_grad():
        expected = whole_model(folder)(ids).logits
    assert expected.std() > 0.1  # a model whose answer is nearly constant would hide mistakes
    for cut in range(LAYERS):
        source = ModelFolder(folder)
        stages = [build_stages(source, [spec])[0] for spec in cut_in_two(source.config, cut)]
        assert difference(run(stages, ids), expected) < 1e-5, f"cut at {cut}"


@all_models
def test_three_and_five_stages_give_the_unsplit_logits(model_folder: MakeModel, architecture: str, tied: bool) -> None:
    folder = model_folder(architecture, tied=tied)
    ids = token_ids(seed=2)
    with torch.no_grad():
        expected = whole_model(folder)(ids).logits
    for bounds in ([0, 2, 5, 6], [0, 1, 2, 4, 5, 6], [0, 6]):
        stages = build_stages(ModelFolder(folder), chain(bounds))
        assert difference(run(stages, ids), expected) < 1e-5, f"bounds {bounds}"


@all_models
def test_the_u_shape_gives_the_unsplit_logits_and_holds_a_tied_embedding_once(
    model_folder: MakeModel, architecture: str, tied: bool
) -> None:
    folder = model_folder(architecture, tied=tied)
    ids = token_ids(seed=3)
    with torch.no_grad():
        expected = whole_model(folder)(ids).logits
    for cut in (0, 2, LAYERS - 1):
        source = ModelFolder(folder)
        names = architecture_of(source.config)
        front_spec, middle_spec, tail_spec = cut_u_shaped(source.config, cut)
        front, tail = build_stages(source, [front_spec, tail_spec])
        (middle,) = build_stages(ModelFolder(folder), [middle_spec])
        assert difference(run([front, middle, tail], ids), expected) < 1e-5, f"cut at {cut}"
        embedding = front.model.get_parameter(names.embedding_tensor)
        assert (tail.model.get_parameter(names.head_tensor) is embedding) == tied


@all_models
def test_decoding_with_a_cache_in_each_stage_gives_the_unsplit_logits(
    model_folder: MakeModel, architecture: str, tied: bool
) -> None:
    # Mistral's window here is 8, so that both the prefill and the decoding go past it.
    folder = model_folder(architecture, tied=tied)
    check_decoding(folder, [[0, 2, 4, 6], [0, 0, 6, 6]])


def check_decoding(folder: Path, many_bounds: Sequence[Sequence[int]]) -> None:
    """Prefill, a second chunk, then single tokens; through stages with a cache each, against the whole model."""
    whole = whole_model(folder)
    ids = token_ids(length=24, seed=4)
    chunks = [ids[:, :12], ids[:, 12:17], *(ids[:, place : place + 1] for place in range(17, 24))]
    for bounds in many_bounds:
        stages = build_stages(ModelFolder(folder), chain(bounds))
        caches = [stage.new_cache() for stage in stages]
        whole_cache = transformers.DynamicCache(config=whole.config)
        for chunk in chunks:
            with torch.no_grad():
                expected = whole(chunk, past_key_values=whole_cache, use_cache=True).logits
            assert difference(run(stages, chunk, caches), expected) < 1e-5, f"bounds {bounds}"
        assert [cache.get_seq_length() for cache in caches] == [24] * len(stages)


SLIDING: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral, all blocks": ("mistral", {"sliding_window": 6}),
    "phi3, all blocks": ("phi3", {"sliding_window": 6}),
    "qwen2, from block 3 on": ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 3}),
    "qwen3, alternating": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 6}
        | {"layer_types": ("sliding_attention", "full_attention", "full_attention") * 2},
    ),
}


@pytest.mark.parametrize("pattern", SLIDING)
def test_sliding_windows_and_layer_patterns_survive_any_cut(tmp_path: Path, pattern: str) -> None:
    architecture, settings = SLIDING[pattern]
    settings = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
    folder = make_model(tmp_path / "model", architecture, **settings)
    full = make_model(tmp_path / "full", architecture, sliding_window=None)
    ids = token_ids(length=20)  # more than three windows
    with torch.no_grad():
        expected = whole_model(folder)(ids).logits
        assert difference(whole_model(full)(ids).logits, expected) > 1e-3  # the window matters here
    for cut in range(1, LAYERS):
        stages = build_stages(ModelFolder(folder), chain([0, cut, LAYERS]))
        assert difference(run(stages, ids), expected) < 1e-5, f"cut at {cut}"
    check_decoding(folder, [[0, 1, 3, 4, 6], [0, 2, 6]])


@pytest.mark.parametrize(
    ("architecture", "rope"),
    [
        ("llama", {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
        ("phi3", {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]}),
    ],
)
def test_scaled_rotary_positions_survive_a_cut(tmp_path: Path, architecture: str, rope: dict[str, Any]) -> None:
    rope = rope | {"rope_theta": 10000.0, "original_max_position_embeddings": 16}
    settings: dict[str, Any] = {"original_max_position_embeddings": 16} if architecture == "phi3" else {}
    folder = make_model(tmp_path, architecture, rope_parameters=rope, **settings)
    ids = token_ids(length=20)
    with torch.no_grad():
        expected = whole_model(folder)(ids).logits
    assert difference(run(build_stages(ModelFolder(folder), chain([0, 2, 5, 6])), ids), expected) < 1e-5


@all_models
def test_only_the_stages_own_tensors_are_read_and_held(model_folder: MakeModel, architecture: str, tied: bool) -> None:
    folder = model_folder(architecture, tied=tied, shards=3)
    specs = chain([0, 2, 5, 6])
    together: set[str] = set()
    for spec in specs:
        source = ModelFolder(folder)
        assert not source.read_names
        (stage,) = build_stages(source, [spec])
        names = spec.tensor_names(source.config)
        assert source.read_names == set(names)
        assert len(names) == len(set(names))
        sizes = {name: source.read(name).numel() for name in names}
        assert sum(parameter.numel() for parameter in stage.parameters()) == sum(sizes.values())
        assert not any(tensor.is_meta for tensor in (*stage.parameters(), *stage.buffers()))
        assert stage.model.config.num_hidden_layers == spec.last - spec.first
        together |= source.read_names
    assert together == ModelFolder(folder).tensor_names()
    assert set(specs[1].tensor_names(source.config)) < together


def test_names_inside_a_stage_map_to_the_whole_model(model_folder: MakeModel) -> None:
    source = ModelFolder(model_folder("llama", tied=False))
    (stage,) = build_stages(source, [StageSpec(4, 6, embeds=False, head=True)])
    assert stage.global_name("model.layers.0.self_attn.q_proj") == "model.layers.4.self_attn.q_proj"
    assert stage.global_name("model.layers.1") == "model.layers.5"
    assert stage.global_name("lm_head") == "lm_head"
    whole = set(dict(whole_model(source.path).named_modules()))
    linear = [name for name, module in stage.model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert len(linear) == 2 * 7 + 1
    assert {stage.global_name(name) for name in linear} <= whole


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_named_linear_modules_are_those_of_a_block(model_folder: MakeModel, architecture: str) -> None:
    source = ModelFolder(model_folder(architecture, tied=False))
    names = architecture_of(source.config)
    (stage,) = build_stages(source, [StageSpec(1, 2, embeds=False, head=False)])
    found = {
        name.rpartition(".")[2]
        for name, module in stage.model.named_modules()
        if isinstance(module, torch.nn.Linear | transformers.pytorch_utils.Conv1D)
    }
    assert found == set(names.linear_modules)
    assert set(names.default_targets) <= found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_reach_the_hidden_states_and_equal_the_unsplit_ones(
    model_folder: MakeModel, architecture: str
) -> None:
    folder = model_folder(architecture, tied=False)
    whole = whole_model(folder)
    ids = token_ids()
    embedded = whole.get_input_embeddings()(ids).detach().requires_grad_()
    whole(inputs_embeds=embedded).logits.square().mean().backward()

    # The embedding's output is where a first stage without blocks ends; GPT-2 has its positions added by then.
    first, front, back = build_stages(ModelFolder(folder), chain([0, 0, 3, 6]))
    x = first(ids).detach().requires_grad_()
    smashed = front(x)
    at_cut = smashed.detach().requires_grad_()
    back(at_cut).square().mean().backward()
    smashed.backward(at_cut.grad)
    assert x.grad is not None
    assert embedded.grad is not None
    torch.testing.assert_close(x.grad, embedded.grad, rtol=1e-5, atol=1e-8)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in front.parameters())


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "phi3"])
def test_dropout_is_off_in_training_mode_too(tmp_path: Path, architecture: str) -> None:
    dropouts = {
        "gpt2": ("attn_pdrop", "embd_pdrop", "resid_pdrop"),
        "gpt_neox": ("attention_dropout", "hidden_dropout"),
        "phi3": ("attention_dropout", "resid_pdrop"),
    }
    settings: dict[str, Any] = dict.fromkeys(dropouts[architecture], 0.5)
    stages = build_stages(ModelFolder(make_model(tmp_path, architecture, **settings)), chain([0, 3, 6]))
    ids = token_ids()
    expected = run(stages, ids)
    for stage in stages:
        stage.train()
    assert torch.equal(run(stages, ids), expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_on_the_right_changes_nothing_for_real_tokens(model_folder: MakeModel, architecture: str) -> None:
    stages = build_stages(ModelFolder(model_folder(architecture, tied=False)), chain([0, 3, 6]))
    ids = token_ids(length=12)
    padded = torch.cat([ids, torch.zeros(2, 6, dtype=torch.int64)], dim=1)
    assert difference(run(stages, padded)[:, :12], run(stages, ids)) < 1e-5


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints_are_cast(tmp_path: Path, stored: torch.dtype) -> None:
    folder = make_model(tmp_path, "llama")
    whole_model(folder).to(stored).save_pretrained(folder)
    ids = token_ids()
    with torch.no_grad():
        expected = whole_model(folder)(ids).logits
    assert ModelFolder(folder).read("model.norm.weight").dtype == stored
    stages = build_stages(ModelFolder(folder), chain([0, 3, 6]))
    assert {parameter.dtype for stage in stages for parameter in stage.parameters()} == {torch.float32}
    assert difference(run(stages, ids), expected) < 1e-5
    kept = build_stages(ModelFolder(folder), chain([0, 3, 6]), dtype=torch.bfloat16)
    assert run(kept, ids).dtype == torch.bfloat16
    assert {buffer.dtype for stage in kept for buffer in stage.buffers()} == {torch.float32}  # rotary frequencies


@pytest.mark.parametrize(("cut", "reason"), [(6, "leaves the server no"), (14, "no layers"), (-1, "not a place")])
def test_a_cut_outside_the_model_says_what_to_choose(cut: int, reason: str) -> None:
    config = make_config("gpt2")
    for cut_model in (cut_in_two, cut_u_shaped):
        with pytest.raises(BadRequest, match=f"cut_layer {cut} .*{reason}.*gpt2 has 6.*choose 1 to 5") as caught:
            cut_model(config, cut)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "spec",
    [
        StageSpec(0, 7, embeds=True, head=False),
        StageSpec(-1, 2, embeds=False, head=False),
        StageSpec(3, 2, embeds=False, head=False),
        StageSpec(2, 4, embeds=True, head=False),
        StageSpec(2, 4, embeds=False, head=True),
    ],
)
def test_a_stage_that_is_not_in_the_model_is_refused(spec: StageSpec) -> None:
    with pytest.raises(BadRequest, match="not a stage"):
        spec.tensor_names(make_config("llama"))


@pytest.mark.parametrize(
    ("architecture", "settings", "reason"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
        ("llama", {"model_type": "mamba"}, "'mamba' are not supported; supported: gpt2, gpt_neox, llama, mistral"),
        ("llama", {"model_type": None}, "not supported"),
        ("llama", {"model_type": ["llama"]}, "not supported"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "not a LlamaForCausalLM"),
        ("llama", {"layer_types": ["sliding_attention"] * LAYERS}, "llama with layer_types sliding_attention"),
        ("qwen3", {"layer_types": ["linear_attention", "full_attention"] * 3}, "layer_types linear_attention"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
        ("llama", {"per_layer_config": {"0": {"intermediate_size": 48}}}, "per_layer_config"),
    ],
)
def test_what_a_cut_would_make_wrong_is_refused(
    tmp_path: Path, architecture: str, settings: dict[str, Any], reason: str
) -> None:
    folder = make_model(tmp_path, architecture, layers=LAYERS)
    change_config(folder, **settings)
    with pytest.raises(UnsupportedModel, match=reason) as caught:
        ModelFolder(folder)
    assert "\n" not in str(caught.value)


def test_a_tensor_of_another_shape_than_the_configuration_says_is_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path, "llama")
    change_config(folder, intermediate_size=48)
    with pytest.raises(BadModelFolder, match=r"gate_proj.weight has shape \(64, 32\), .* \(48, 32\)"):
        build_stages(ModelFolder(folder), chain([0, 6]))


MEASURE = """
import json, sys
import torch, transformers
from isthmus.split.models.source import ModelFolder
from isthmus.split.models.stage import StageSpec, build_stages

def peak():  # bytes
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

transformers.LlamaForCausalLM  # imports lazily
baseline = peak()
source = ModelFolder(sys.argv[1])
(stage,) = build_stages(source, [StageSpec(4, 6, embeds=False, head=False)])
held = sum(p.numel() * p.element_size() for p in stage.parameters())
with torch.no_grad():
    stage(torch.ones(1, 4, source.config.hidden_size))
print(json.dumps({"grown": peak() - baseline, "held": held, "read": sorted(source.read_names)}))
"""


@pytest.mark.large
@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_building_an_eighth_of_a_model_of_over_1_gb_needs_an_eighth_of_its_memory(tmp_path: Path) -> None:
    try:
        total = write_large_model(tmp_path)
        done = subprocess.run([sys.executable, "-c", MEASURE, tmp_path], capture_output=True, text=True, timeout=240)
    finally:
        for path in tmp_path.glob("*.safetensors"):
            path.unlink()
    assert total > 1e9
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert {name.split(".")[2] for name in measured["read"]} == {"4", "5"}
    assert total / 9 < measured["held"] < total / 7.9
    assert measured["grown"] < 1.25 * measured["held"] + 32e6  # the stage itself, and a little for computing


def write_large_model(folder: Path) -> int:
    """A Llama of 16 layers in 8 shards, its blocks all alike; returns bytes of weights."""
    config = transformers.LlamaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=16, num_attention_heads=8, vocab_size=1000
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in transformers.LlamaForCausalLM(config).state_dict().items()}
    weight_map: dict[str, str] = {}
    total = 0
    for shard in range(8):
        filename = f"model-{shard + 1:05d}-of-00008.safetensors"
        names = [name for name in shapes if shard_of(name) == shard]
        tensors = {name: torch.full(tuple(shapes[name]), 0.01) for name in names}
        save_file(tensors, folder / filename)
        total += sum(tensor.numel() * 4 for tensor in tensors.values())
        weight_map |= dict.fromkeys(names, filename)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def shard_of(name: str) -> int:
    parts = name.split(".")
    return int(parts[2]) // 2 if parts[1] == "layers" else 0
