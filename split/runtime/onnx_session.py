"""ONNX Runtime on torch's memory: its options, sessions on the processor, and tensors bound to inputs and outputs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from isthmus.split.runtime.onnx_builder import MODEL_NAME

_TYPES = {torch.float32: np.float32, torch.int32: np.int32, torch.int64: np.int64}


@dataclass(frozen=True)
class OnnxOptions:
    """How a graph computes, and where it is kept.

    weights: format of the linear modules' weights, one of `choose.WEIGHTS`. threads: 0 for as many as torch has.
    spinning: whether threads wait for work busily: single tokens are 10 to 20 % faster on a machine that does nothing
    else, and up to 60 % slower on one that does. cache: the folder of graphs; None: in the user's cache folder.
    """

    weights: str = "float32"
    threads: int = 0
    spinning: bool = False
    cache: Path | None = None


def open_session(folder: Path, options: OnnxOptions) -> onnxruntime.InferenceSession:
    """Load the graph of a folder."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.threads or torch.get_num_threads()
    settings.add_session_config_entry("session.intra_op.allow_spinning", str(int(options.spinning)))
    if options.spinning:  # long enough from one operator to the next, and no longer
        settings.add_session_config_entry("session.intra_op.spin_duration_us", "50")
    settings.log_severity_level = 3
    return onnxruntime.InferenceSession(folder / MODEL_NAME, settings, providers=["CPUExecutionProvider"])


def bind_inputs(binding: onnxruntime.IOBinding, **tensors: Tensor) -> None:
    """Have the graph read these contiguous tensors where they are; who binds them has to keep them."""
    for name, tensor in tensors.items():
        binding.bind_input(name, "cpu", 0, _TYPES[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())


def bind_outputs(binding: onnxruntime.IOBinding, **tensors: Tensor) -> None:
    """Have the graph write into these contiguous tensors."""
    for name, tensor in tensors.items():
        binding.bind_output(name, "cpu", 0, _TYPES[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
