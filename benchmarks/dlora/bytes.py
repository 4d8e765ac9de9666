"""What of a module-by-module exchange does not have to cross: the bytes of a step of DLoRA, one saving after another.

Counted for the first batch of the text, all modules active, float32. The last figure is measured: a step of the real
device and the real backbone, in this process, through the codecs of both ends.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from benchmarks.harness import (
    ALL_LINEAR,
    E2E_FILE,
    DataFile,
    JsonFile,
    begin,
    columns_of,
    command,
    console,
    table,
    write_json,
)
from isthmus.coordinator.cli.common import human_bytes
from isthmus.split.data.documents import read_documents
from isthmus.split.data.sequences import IGNORE, Sequences, batch_indices, build_sequences, seen_positions
from isthmus.split.job.config import TrainingConfig
from isthmus.split.lora.sites import Layout, layout_of
from isthmus.split.methods.local import train_locally
from isthmus.split.models.source import open_model
from isthmus.split.resources.ledger import Ledger

_STEPS = 8
_CODECS = ("int8", "hadamard,uniform:step=0.25,zstd")


def savings(layout: Layout, rows: int, rows_of_use: int) -> dict[str, int]:
    """Bytes of modules a step, both ways, after each saving and those before it. rows: of the batch, padding too."""
    sites = [site for site in layout.sites if site.block >= layout.cut]
    remote = layout.remote
    each = sum(4 * (module.inputs + module.outputs) for site in sites for module in site.modules)  # float32, one pass
    resent = sum(4 * module.inputs for site in sites for module in site.modules)
    shared = sum(4 * (site.inputs + site.outputs(remote)) for site in sites)
    lowest = 0 if layout.front else 4 * min(sites, key=lambda site: site.number).inputs
    return {
        "every module by itself, inputs sent in both passes": rows * (2 * each + resent),
        "inputs are kept for the backward pass": rows * 2 * each,
        "modules share an input, and one gradient by it": rows * 2 * shared,
        "only rows of use cross": rows_of_use * 2 * shared,
        "no gradient by the lowest input (cut 0)": rows_of_use * (2 * shared - lowest),
    }


def measured(model: str, training: TrainingConfig, text: Sequences) -> int:
    """Bytes of modules in the job's steps."""
    run = train_locally(open_model(model), training, [(text, None)])
    return _of_modules(run.ledgers["d0"])


def _of_modules(ledger: Ledger) -> int:
    traffic = ledger.traffic
    return sum(size for (_, kind, _), size in traffic.payload_bytes.items() if kind.endswith(" modules"))


def main(
    data: DataFile = E2E_FILE,
    model: Annotated[str, typer.Option(help="Folder in hub format, or default.")] = "default",
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    sequence_length: Annotated[int, typer.Option(min=8)] = 128,
    json_file: JsonFile = None,
) -> None:
    """The bytes of a step's modules after each saving.

    Example: python -m benchmarks.dlora.bytes --json dlora_bytes.json
    """
    columns = columns_of(data)
    training = TrainingConfig.of(
        method="dlora",
        cut_layer=0,
        steps=1,
        batch_size=batch_size,
        sequence_length=sequence_length,
        precision="float32",
        codec="none",
        micro_batches=1,
        packing="padded" if columns else "packed",
        target_modules=ALL_LINEAR,
        validation_fraction=0,
        **columns,
    )
    folder = open_model(model)
    text = build_sequences(read_documents(data, training.text), folder.tokenizer(), training.text, keep_last=False)
    rows = batch_indices(len(text), batch_size, 0, training.seed)
    wanted = text.labels[rows][:, 1:] != IGNORE
    of_use = int(seen_positions(wanted).sum())
    found: dict[str, int] = savings(layout_of(folder.config, training), batch_size * sequence_length, of_use)
    with console.status("a step"):
        found["measured, float32"] = measured(model, training, text)
        several = training.but(steps=_STEPS)  # in the first one B is zero, and with it half of what crosses
        exact = measured(model, several, text)
        for codec in _CODECS:
            share = measured(model, several.but(codec=codec), text) / exact
            found[f"{codec}, its share over {_STEPS} steps"] = int(share * found["measured, float32"])
    result = begin(training=asdict(training), model=model, bytes=found)
    first = next(iter(found.values()))
    lines = [(name, human_bytes(size), f"{size / first:.3f}") for name, size in found.items()]
    title = f"modules of a step, {of_use} of {batch_size * sequence_length} rows of use"
    console.print(table(title, ("", "bytes", "of the first"), lines))
    write_json(json_file, result)


if __name__ == "__main__":
    command(main)
