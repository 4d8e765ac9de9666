"""What is read from a model folder, and what every broken folder says."""

from __future__ import annotations

import contextlib
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from isthmus.split.errors import BadModelFolder
from isthmus.split.models import default_model
from isthmus.split.models.safetensors_file import DTYPES, read_header, read_tensor
from isthmus.split.models.source import INDEX_NAME, SINGLE_NAME, ModelFolder, open_model
from isthmus.split.models.stage import StageSpec, build_stages
from tests.split.tiny_models import VOCABULARY, change_config, make_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model", "llama", layers=3)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = make_model(tmp_path / "sharded", "llama", layers=3, shards=3)
    assert len(list(folder.glob("*.safetensors"))) >= 3
    return folder


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def logits(source: ModelFolder) -> torch.Tensor:
    ids = torch.arange(12)[None] % VOCABULARY
    (stage,) = build_stages(source, [StageSpec(0, source.config.num_hidden_layers, embeds=True, head=True)])
    result: torch.Tensor = stage(ids)
    return result


@pytest.mark.parametrize("shards", [1, 3])
def test_tensors_are_those_that_the_safetensors_library_reads(tmp_path: Path, shards: int) -> None:
    source = ModelFolder(make_model(tmp_path, "qwen2", layers=2, shards=shards))
    expected = stored_tensors(tmp_path)
    assert source.tensor_names() == set(expected)
    for name, value in expected.items():
        assert torch.equal(source.read(name), value)
    assert source.read_names == set(expected)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype_and_odd_shape_is_read_as_it_is(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.randint(0, 2, (3, 5), generator=torch.Generator().manual_seed(0)).to(dtype)
    tensors = {"matrix": values, "scalar": values[0, 0].clone(), "empty": values[:0].clone(), "row": values[1].clone()}
    save_file(tensors, tmp_path / SINGLE_NAME)
    places = read_header(tmp_path / SINGLE_NAME)
    assert set(places) == set(tensors)
    for name, value in tensors.items():
        read = read_tensor(places[name])
        assert read.dtype == dtype
        assert torch.equal(read, value)


def test_the_tokenizer_comes_from_the_folder(folder: Path) -> None:
    tokenizer = ModelFolder(folder).tokenizer()
    text = "A device keeps its text.\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_neox"])
def test_a_checkpoint_of_the_bare_base_model_has_the_same_names(tmp_path: Path, architecture: str) -> None:
    folder = make_model(tmp_path, architecture, layers=2, tied=True)
    expected = logits(ModelFolder(folder))
    names = ModelFolder(folder).tensor_names()
    tensors = {name.partition(".")[2]: value for name, value in stored_tensors(folder).items()}
    if architecture == "gpt2":  # as on the hub, with the buffers of old
        tensors |= {f"h.{index}.attn.bias": torch.ones(1, 1, 8, 8) for index in range(2)}
    save_file(tensors, folder / SINGLE_NAME)
    source = ModelFolder(folder)
    assert names <= source.tensor_names()
    assert torch.equal(logits(source), expected)
    assert source.read_names == names


def test_a_head_that_is_stored_is_used_even_where_the_configuration_says_tied(folder: Path) -> None:
    expected = logits(ModelFolder(folder))
    change_config(folder, tie_word_embeddings=True)
    assert torch.equal(logits(ModelFolder(folder)), expected)
    whole: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(whole(torch.arange(12)[None]).logits, expected, rtol=1e-5, atol=1e-5)


def test_default_names_the_model_of_the_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_model, "DEFAULT_MODEL_FOLDER", folder)
    assert open_model("default").path == folder
    assert open_model(str(folder)).path == folder


def test_a_hub_id_is_downloaded_without_code_and_pickles(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(hub_id: str, *, allow_patterns: list[str]) -> str:
        asked.update(hub_id=hub_id, patterns=allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert open_model("someone/some-model").path == folder
    assert asked["hub_id"] == "someone/some-model"
    assert all(pattern.endswith((".json", ".safetensors", ".txt", ".jinja", ".model")) for pattern in asked["patterns"])


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(hub_id: str, *, allow_patterns: list[str]) -> str:
        raise ConnectionError("no route\nto the host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(BadModelFolder, match=r"someone/some-model is not a folder, and the hub .*: no route$"):
        open_model("someone/some-model")


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./models/of/mine", "~/no-such-model", "../llama", ""])
def test_a_path_is_never_looked_for_on_the_hub(path: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadModelFolder, match=r"no model folder at|no config\.json"):
        open_model(path)


# ---- broken folders: each by what is done to a good one, and what the message says ----


def replace_by_pickle(folder: Path) -> None:
    (folder / SINGLE_NAME).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))


def truncate(folder: Path) -> None:
    path = folder / SINGLE_NAME
    path.write_bytes(path.read_bytes()[:-100])


def write_header(header: Any) -> Callable[[Path], None]:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()

    def write(folder: Path) -> None:
        (folder / SINGLE_NAME).write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))

    return write


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "config not JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json is not JSON"),
    "config not an object": (lambda folder: (folder / "config.json").write_text("[]"), "not a model configuration"),
    "config not text": (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\x00"), "cannot read"),
    "config of wrong types": (
        lambda folder: change_config(folder, hidden_size="wide"),
        "not a valid llama configuration: .*hidden_size",
    ),
    "no weights": (lambda folder: (folder / SINGLE_NAME).unlink(), "has no model.safetensors and no"),
    "only a pickle": (replace_by_pickle, r"only pickled weights \(pytorch_model.bin\), .* convert them to safetensors"),
    "truncated": (truncate, "was not copied to its end"),
    "empty file": (lambda folder: (folder / SINGLE_NAME).write_bytes(b""), "too short"),
    "endless header": (
        lambda folder: (folder / SINGLE_NAME).write_bytes(struct.pack("<Q", 1 << 62) + b"{}"),
        "header is longer",
    ),
    "header not JSON": (write_header(b"\xff{"), "header is not JSON"),
    "header not an object": (write_header([1]), "not a JSON object"),
    "entry not valid": (write_header({"x": {"dtype": "F32"}}), "entry of x is not valid"),
    "entry a list": (write_header({"x": [1]}), "entry of x is not valid"),
    "wrong size": (write_header({"x": entry(0, 8, [3])}), "size of x does not fit its shape"),
    "negative offset": (write_header({"x": entry(-8, 0, [2])}), "size of x does not fit"),
    "overlap": (write_header({"x": entry(0, 8, [2]), "y": entry(4, 8, [1])}), "overlap or leave gaps"),
    "gap": (write_header({"x": entry(4, 8, [1])}), "overlap or leave gaps"),
    "bytes left over": (write_header({"x": entry(0, 4, [1])}), "its header speaks of"),
    "unknown dtype": (write_header({"x": entry(0, 8, [8], "F8_E4M3")}), "data type F8_E4M3"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_says_what_is_wrong(folder: Path, case: str) -> None:
    damage, message = BROKEN[case]
    damage(folder)
    with pytest.raises(BadModelFolder, match=message) as caught:
        ModelFolder(folder)
    assert "\n" not in str(caught.value)


def change_index(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    path = folder / INDEX_NAME
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(BadModelFolder, match=f"names {shard.name}, which is not there"):
        ModelFolder(sharded)


def test_a_tensor_that_is_not_in_the_shard_of_the_index_is_named(sharded: Path) -> None:
    first, *_, last = sorted(path.name for path in sharded.glob("*.safetensors"))
    change_index(sharded, lambda weights: weights.update({"lm_head.weight": last, "model.embed_tokens.weight": last}))
    assert first != last
    source = ModelFolder(sharded)
    with pytest.raises(BadModelFolder, match=rf"embed_tokens.weight is in {last}, which has no such tensor"):
        logits(source)


def test_a_tensor_that_the_index_leaves_out_is_named(sharded: Path) -> None:
    change_index(sharded, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    source = ModelFolder(sharded)
    build_stages(source, [StageSpec(0, 1, embeds=True, head=False)])
    with pytest.raises(BadModelFolder, match=r"no tensor model.layers.1.mlp.up_proj.weight"):
        build_stages(source, [StageSpec(1, 2, embeds=False, head=False)])


@pytest.mark.parametrize("shard", ["../other.safetensors", "/etc/passwd", "weights.bin", "a/b.safetensors"])
def test_an_index_cannot_name_files_elsewhere_or_of_another_kind(sharded: Path, shard: str) -> None:
    save_file({"x": torch.zeros(1)}, sharded.parent / "other.safetensors")
    change_index(sharded, lambda weights: weights.update({"lm_head.weight": shard}))
    with pytest.raises(BadModelFolder, match="not a safetensors file in the folder"):
        ModelFolder(sharded)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_a_broken_index_is_refused(sharded: Path, text: str) -> None:
    (sharded / INDEX_NAME).write_text(text)
    with pytest.raises(BadModelFolder, match="not a safetensors index"):
        ModelFolder(sharded)


def test_only_the_shards_that_are_needed_are_opened(sharded: Path) -> None:
    """A broken shard that a stage does not need does not stop it."""
    names = json.loads((sharded / INDEX_NAME).read_text())["weight_map"]
    needed = {names[name] for name in StageSpec(0, 1, True, False).tensor_names(ModelFolder(sharded).config)}
    others = [path for path in sharded.glob("*.safetensors") if path.name not in needed]
    assert others
    for path in others:
        path.write_bytes(b"broken")
    build_stages(ModelFolder(sharded), [StageSpec(0, 1, embeds=True, head=False)])


def test_a_missing_tokenizer_is_missed_only_when_it_is_wanted(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()
    source = ModelFolder(folder)
    assert logits(source).isfinite().all()
    with pytest.raises(BadModelFolder, match="has no tokenizer"):
        source.tokenizer()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"added_tokens": [], "model": {"type": "BPE", "vocab": 3}}'])
def test_a_broken_tokenizer_is_one_line(folder: Path, text: str) -> None:
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(BadModelFolder, match=r"tokenizer in .* cannot be loaded") as caught:
        ModelFolder(folder).tokenizer()
    assert "\n" not in str(caught.value)


def test_code_that_a_tokenizer_configuration_names_is_never_run(folder: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (folder / "evil.py").write_text(f"import pathlib\npathlib.Path({str(ran)!r}).touch()\nclass Evil: ...\n")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "Evil"}
    path.write_text(json.dumps(settings | {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}))
    with contextlib.suppress(BadModelFolder):  # refused, or loaded by a class of the library: either is safe
        ModelFolder(folder).tokenizer()
    assert not ran.exists()
