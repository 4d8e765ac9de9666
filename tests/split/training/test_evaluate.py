"""Perplexity is what plain transformers says, window by window."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from isthmus.split.errors import BadData, BadModelFolder, BadRequest
from isthmus.split.job.groups import TextSettings
from isthmus.split.training import evaluate, loss
from isthmus.split.training.evaluate import evaluate_files
from isthmus.split.training.loss import nll, nll_where_wanted
from isthmus.split.training.perplexity import PERPLEXITY, perplexity

TEXT = (
    "The old mill stands by the river.\n\nNobody grinds there now.\n\nThe wheel turns when the water is high.\n\n" * 3
)
ROWS = [("who", "the miller"), ("where is the old mill", "by the river"), ("when", "now")]
LENGTH = 16
DATA = TextSettings(sequence_length=LENGTH)


def make_model(folder: Path, layers: int = 2, vocabulary: int = 300, positions: int = 64) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=positions,
        initializer_range=0.5,  # far from uniform, so that a wrong window or label shows
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_adapter(folder: Path, model: Path) -> Path:
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(model)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(base, lora).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = make_model(tmp_path_factory.mktemp("models") / "tiny")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapters") / "lora", model)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"q": q, "text": a}) + "\n" for q, a in ROWS))
    return path


def naive(network: torch.nn.Module, streams: list[tuple[list[int], list[int]]]) -> tuple[float, int]:
    """Sum and count over windows of each stream of (ids, labels), one at a time, by the model's own loss."""
    total, tokens = 0.0, 0
    for ids, labels in streams:
        for start in range(0, len(ids), LENGTH):
            part = torch.tensor([labels[start : start + LENGTH]])
            count = int((part[:, 1:] != -100).sum())
            if count:
                with torch.no_grad():
                    mean = network(input_ids=torch.tensor([ids[start : start + LENGTH]]), labels=part).loss
                total, tokens = total + mean.item() * count, tokens + count
    return total, tokens


def plain(model: Path, adapter: Path | None = None) -> torch.nn.Module:
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return (network if adapter is None else PeftModel.from_pretrained(network, adapter)).eval()


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_text_with_a_ragged_last_window_equals_a_plain_loop(
    model: Path, text: Path, tokenizer: PreTrainedTokenizerFast, batch_size: int
) -> None:
    ids = tokenizer(TEXT)["input_ids"]
    assert len(ids) > LENGTH
    assert len(ids) % LENGTH > 1
    total, tokens = naive(plain(model), [(ids, ids)])
    found = evaluate_files(str(model), [text], data=DATA, batch_size=batch_size)
    assert found.tokens == tokens == len(ids) - math.ceil(len(ids) / LENGTH)
    assert found.nll == pytest.approx(total, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert (found.files, found.sequence_length, found.model) == ((str(text),), LENGTH, str(model))


def test_an_adapter_equals_plain_peft_and_changes_the_figure(
    model: Path, adapter: Path, text: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = tokenizer(TEXT)["input_ids"]
    total, tokens = naive(plain(model, adapter), [(ids, ids)])
    found = evaluate_files(str(model), [text], adapter=adapter, data=DATA)
    assert found.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert found.adapter == str(adapter)
    assert abs(found.perplexity / evaluate_files(str(model), [text], data=DATA).perplexity - 1) > 0.01


def test_files_are_summed_before_dividing_and_records_end_with_eos(
    model: Path, text: Path, rows: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = tokenizer(TEXT)["input_ids"]
    records = [token for _, answer in ROWS for token in [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]]
    total, tokens = naive(plain(model), [(ids, ids), (records, records)])
    found = evaluate_files(str(model), [text, rows], data=DATA)
    assert found.nll == pytest.approx(total, rel=1e-5)
    assert found.tokens == tokens


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_with_prompts_only_completions_count(
    model: Path, rows: Path, tokenizer: PreTrainedTokenizerFast, packing: str
) -> None:
    pairs = []
    for question, answer in ROWS:
        prompt, completion = tokenizer(question)["input_ids"], [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
        pairs.append((prompt + completion, [-100] * len(prompt) + completion))
    if packing == "packed":
        streams = [([i for ids, _ in pairs for i in ids], [i for _, labels in pairs for i in labels])]
    else:
        streams = [(ids[:LENGTH], labels[:LENGTH]) for ids, labels in pairs]
    total, tokens = naive(plain(model), streams)
    data = TextSettings(sequence_length=LENGTH, packing=packing, prompt_column="q", completion_column="text")
    found = evaluate_files(str(model), [rows], data=data)
    assert found.nll == pytest.approx(total, rel=1e-5)
    assert found.tokens == tokens


def test_default_names_the_shipped_model(model: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "DEFAULT_MODEL_FOLDER", model)
    found = evaluate_files("default", [text], data=DATA)
    assert found.model == "default"
    assert found.nll == evaluate_files(str(model), [text], data=DATA).nll


def test_progress_counts_windows_to_the_end(model: Path, text: Path, rows: Path) -> None:
    calls: list[tuple[int, int]] = []
    evaluate_files(str(model), [text, rows], data=DATA, batch_size=2, progress=lambda *call: calls.append(call))
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert {windows for _, windows in calls} == {calls[-1][0]}


def test_the_definition_says_what_matters() -> None:
    for word in ("exp", "per predicted token", "non-overlapping windows", "every token but the first", "EOS"):
        assert word in PERPLEXITY


def test_perplexity_too_big_for_a_float_is_infinite() -> None:
    assert perplexity(1e6, 1) == math.inf


# The loss


def logits_and_labels(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(3, 7, 11, generator=generator) * 3).to(dtype).requires_grad_()
    labels = torch.randint(0, 11, (3, 7), generator=generator)
    labels[torch.rand(3, 7, generator=generator) < 0.3] = -100
    return logits, labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [2**24, 44])
def test_nll_and_its_gradient_are_the_sum_over_predicted_tokens(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, chunk: int
) -> None:
    monkeypatch.setattr(loss, "_CHUNK_VALUES", chunk)
    logits, labels = logits_and_labels(dtype)
    total, tokens = nll(logits, labels)
    (gradient,) = torch.autograd.grad(total, logits)

    logs = logits.float().log_softmax(-1)
    picked = [logs[row, t, labels[row, t + 1]] for row in range(3) for t in range(6) if int(labels[row, t + 1]) != -100]
    expected = -torch.stack(picked).sum()
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    assert total.dtype == torch.float32
    assert tokens == len(picked)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def test_nll_without_anything_to_predict_is_zero_with_a_gradient() -> None:
    logits, labels = logits_and_labels(torch.float32)
    total, tokens = nll(logits, torch.full_like(labels, -100))
    total.backward()  # type: ignore[no-untyped-call]
    assert (total.item(), tokens) == (0.0, 0)
    assert logits.grad is not None
    assert not logits.grad.any()


def test_big_logits_are_never_copied_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "_CHUNK_VALUES", 44)
    logits, labels = logits_and_labels(torch.float32)
    saved: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() != logits.untyped_storage().data_ptr():
            saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        nll(logits, labels)
    assert sum(saved) < logits.numel() / 2


# What users get wrong


def test_no_files_and_no_batch_are_refused(model: Path, text: Path) -> None:
    with pytest.raises(BadRequest, match="no file to evaluate on"):
        evaluate_files(str(model), [], data=DATA)
    with pytest.raises(BadRequest, match="batch_size is 0"):
        evaluate_files(str(model), [text], data=DATA, batch_size=0)


def test_files_that_cannot_be_used_are_named(model: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(BadData, match=r"empty\.txt is empty"):
        evaluate_files(str(model), [text, tmp_path / "empty.txt"], data=DATA)
    (tmp_path / "short.txt").write_text("a")
    with pytest.raises(BadData, match=r"short\.txt: nothing to predict in 1 tokens"):
        evaluate_files(str(model), [text, tmp_path / "short.txt"], data=DATA)


def refused(model: Path, text: Path, adapter: Path | None = None) -> str:
    """The message with which the model or the adapter is refused."""
    with pytest.raises(BadModelFolder) as caught:
        evaluate_files(str(model), [text], adapter=adapter, data=DATA)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_model_folders_that_cannot_be_used_say_what_is_missing(model: Path, text: Path, tmp_path: Path) -> None:
    assert "is not a folder" in refused(tmp_path / "gone", text)

    no_tokenizer = shutil.copytree(model, tmp_path / "no_tokenizer")
    for path in no_tokenizer.glob("tokenizer*"):
        path.unlink()
    assert "no tokenizer that can be loaded" in refused(no_tokenizer, text)

    no_weights = shutil.copytree(model, tmp_path / "no_weights")
    (no_weights / "model.safetensors").unlink()
    torch.save({}, no_weights / "pytorch_model.bin")
    assert "*.safetensors" in refused(no_weights, text)

    broken = shutil.copytree(model, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"not a safetensors file")
    assert "cannot be loaded" in refused(broken, text)


def test_a_model_with_tensors_left_out_is_not_filled_up_at_random(
    model: Path, text: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = make_model(tmp_path / "short", layers=1)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    assert "lacks 9 tensors (model.layers.1." in refused(folder, text)


def test_a_tokenizer_of_another_model_is_noticed(
    text: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = make_model(tmp_path / "small", vocabulary=100)
    tokenizer.save_pretrained(folder)
    assert "its embedding has 100" in refused(folder, text)


def test_windows_longer_than_the_model_takes_are_refused(model: Path, text: Path) -> None:
    with pytest.raises(BadRequest, match="choose up to 64"):
        evaluate_files(str(model), [text], data=TextSettings(sequence_length=65))


def test_adapters_that_do_not_fit_are_refused(model: Path, adapter: Path, text: Path, tmp_path: Path) -> None:
    assert "is not a PEFT adapter" in refused(model, text, tmp_path / "gone")
    fewer, more = (make_model(tmp_path / f"layers_{n}", layers=n) for n in (1, 3))
    assert "does not fit the model (4 tensors" in refused(model, text, make_adapter(tmp_path / "fewer", fewer))
    assert "does not fit the model (4 tensors" in refused(model, text, make_adapter(tmp_path / "more", more))

    strange = shutil.copytree(adapter, tmp_path / "strange")
    config = json.loads((strange / "adapter_config.json").read_text())
    (strange / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["c_attn"]}))
    assert "does not fit the model" in refused(model, text, strange)

    pickled = shutil.copytree(adapter, tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").unlink()
    torch.save({}, pickled / "adapter_model.bin")
    assert "is not a PEFT adapter" in refused(model, text, pickled)


def test_a_device_that_is_not_there_is_refused(model: Path, text: Path) -> None:
    with pytest.raises(BadRequest, match="device 'toaster' cannot be used"):
        evaluate_files(str(model), [text], data=DATA, device="toaster")


@pytest.mark.parametrize("predicted", ["few", "nearly all", "none", "the last only"])
def test_logits_only_where_something_is_predicted_give_the_same_loss_and_gradient(predicted: str) -> None:
    generator = torch.Generator().manual_seed(3)
    last = torch.randn(3, 8, 16, generator=generator)
    labels = torch.randint(0, 50, (3, 8), generator=generator)
    if predicted == "few":
        labels[0], labels[1:, :5] = -100, -100
    elif predicted == "none":
        labels[:] = -100
    elif predicted == "the last only":
        labels[:, :-1] = -100
    head = torch.nn.Linear(16, 50)
    found = []
    for way in (lambda x: nll(head(x), labels), lambda x: nll_where_wanted(head, x, labels)):
        inputs = last.clone().requires_grad_()
        total, tokens = way(inputs)
        total.backward()
        found.append((float(total.detach()), tokens, inputs.grad))
    assert found[0][:2] == pytest.approx(found[1][:2], rel=1e-6)
    torch.testing.assert_close(found[0][2], found[1][2])
