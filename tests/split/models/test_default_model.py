"""The model in the package is a real one: it loads with plain transformers, and it predicts text it has not seen."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from isthmus.split.data.stdlib_text import (
    PRIVATE_MODULES,
    StdlibDocument,
    private_docstrings,
    private_text,
    text_digest,
    training_documents,
)
from isthmus.split.models.default_model import DEFAULT_MODEL_FOLDER

UNSEEN = """Rivers carry sand and stones from the mountains to the sea. When the water slows down, the heavy
stones are left behind first, and the fine sand is carried on until the current is too weak. If the value of the
argument is not a string, an exception is raised and the name of the file is returned to the caller.
"""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(DEFAULT_MODEL_FOLDER)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(DEFAULT_MODEL_FOLDER).eval()


@pytest.fixture(scope="module")
def documents() -> list[StdlibDocument]:
    return training_documents()


@pytest.fixture(scope="module")
def private_texts() -> dict[str, str]:
    return {name: private_text(name) for name in PRIVATE_MODULES}


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n\treturn  x\r\n\n\n",
        "  leading and trailing  \t",
        "naïve 日本語 Ελληνικά עברית 🧪👩‍🔬",
        "combining e\u0301, zero width \u200b, byte order mark \ufeff, null \x00, line separator \u2028",
        "a . b , c n't '  s  !",
        "",
    ],
)
def test_decoding_gives_the_encoded_text_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_fast_tokenizer_adds_no_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.is_fast
    assert tokenizer.eos_token_id not in tokenizer("some text")["input_ids"]
    assert tokenizer(tokenizer.eos_token)["input_ids"] == [tokenizer.eos_token_id]


def test_chat_messages_become_a_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "user", "content": "What is a list?"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == "user: What is a list?\n\nassistant:"


def test_weights_are_stored_small_and_loaded_as_float32(model: PreTrainedModel) -> None:
    weights = DEFAULT_MODEL_FOLDER / "model.safetensors"
    assert sum(path.stat().st_size for path in DEFAULT_MODEL_FOLDER.glob("*.safetensors")) <= 15_000_000
    with safe_open(weights, framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_model_beats_a_unigram_model_of_each_private_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, private_texts: dict[str, str]
) -> None:
    """The unigram model knows the frequencies of the whole text; the language model has never seen any of it."""
    for name, text in private_texts.items():
        ids = tokenizer(text, verbose=False)["input_ids"]
        assert _nats(model, ids) < 0.9 * _unigram_nats(ids), name


def test_the_model_beats_chance_on_prose_from_elsewhere(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert _nats(model, tokenizer(UNSEEN)["input_ids"]) < 0.75 * math.log(len(tokenizer))


def test_each_exit_predicts_and_later_ones_predict_better(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, private_texts: dict[str, str]
) -> None:
    ids = torch.tensor([tokenizer(private_texts["email"][50_000:60_000])["input_ids"][:512]])
    with torch.no_grad():
        states = model.model(ids, output_hidden_states=True).hidden_states
        # The last of the hidden states is normed already, the others are what the layers hand on.
        exits = [model.lm_head(model.model.norm(x)) for x in states[1:-1]] + [model.lm_head(states[-1])]
    losses = [float(torch.nn.functional.cross_entropy(x[0, :-1], ids[0, 1:])) for x in exits]
    assert all(math.isfinite(loss) and loss < math.log(len(tokenizer)) for loss in losses)
    assert losses[-1] < losses[2] < losses[0]


def test_it_keeps_predicting_up_to_its_context_length(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, private_texts: dict[str, str]
) -> None:
    """The second half of a full context is not worse than the first: long positions were trained."""
    rows = [tokenizer(text[60_000:75_000])["input_ids"][:512] for text in private_texts.values()]
    ids = torch.tensor(rows)
    with torch.no_grad():
        logits = model(ids).logits
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    assert losses[:, 256:].mean() < 1.1 * losses[:, :256].mean()


def test_greedy_generation_is_repeatable_and_makes_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompt = tokenizer("Return the number of", return_tensors="pt")
    first, second = (model.generate(**prompt, max_new_tokens=24, do_sample=False)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert len(set(first.tolist())) > 8


def test_the_private_modules_are_not_in_the_training_text(documents: list[StdlibDocument]) -> None:
    names = {document.name.split(".")[0] for document in documents}
    assert not names & set(PRIVATE_MODULES)
    text = "\n".join(" ".join(document.text.split()) for document in documents)
    long = [" ".join(docstring.split()) for docstring in private_docstrings(PRIVATE_MODULES) if len(docstring) > 150]
    assert len(long) > 100
    assert [docstring for docstring in long if docstring in text] == []


def test_the_training_text_is_the_same_every_time(documents: list[StdlibDocument]) -> None:
    assert len(documents) > 300
    assert text_digest(documents) == text_digest(training_documents())
    assert len({document.name for document in documents}) == len(documents)


def test_the_private_texts_have_comparable_sizes(private_texts: dict[str, str]) -> None:
    assert len(private_texts) == 3
    for name, text in private_texts.items():
        assert 150_000 < len(text) < 400_000, name


def test_an_unknown_module_is_named_in_the_error() -> None:
    with pytest.raises(ValueError, match="no source of the module nosuchmodule"):
        private_text("nosuchmodule")


def test_the_card_says_what_the_training_record_says() -> None:
    record = json.loads((DEFAULT_MODEL_FOLDER / "training.json").read_text(encoding="utf-8"))
    card = Path(DEFAULT_MODEL_FOLDER / "README.md").read_text(encoding="utf-8")
    assert record["text_sha256"] in card
    assert f"--steps {record['recipe']['steps']} --decay-from {record['recipe']['decay_from']}" in card
    for value in record["bits_per_byte_at_each_exit"]:
        assert f"{value:.3f}" in card


def _nats(model: PreTrainedModel, ids: list[int], length: int = 256, windows: int = 5) -> float:
    """Mean loss per token in windows of `length`, spread evenly over the text."""
    step = max(length, len(ids) // windows)
    losses = []
    with torch.no_grad():
        for start in range(0, len(ids) - 1, step):
            row = torch.tensor([ids[start : start + length + 1]])
            losses.append(torch.nn.functional.cross_entropy(model(row[:, :-1]).logits[0], row[0, 1:], reduction="none"))
    return float(torch.cat(losses).mean())


def _unigram_nats(ids: list[int]) -> float:
    counts = Counter(ids)
    return -sum(n / len(ids) * math.log(n / len(ids)) for n in counts.values())
