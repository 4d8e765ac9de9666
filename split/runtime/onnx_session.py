"""ONNX Runtime on torch's memory: sessions on the processor, and tensors bound to their inputs and outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from isthmus.split.runtime.onnx_builder import MODEL_NAME

_TYPES = {torch.float32: np.float32, torch.int32: np.int32, torch.int64: np.int64}


def open_session(folder: Path, threads: int, spinning: bool) -> onnxruntime.InferenceSession:
    """folder: of the graph. threads: 0 takes as many as torch. spinning: whether they wait for work busily."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
    if spinning:  # long enough from one operator to the next, and no longer
        options.add_session_config_entry("session.intra_op.spin_duration_us", "50")
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(folder / MODEL_NAME, options, providers=["CPUExecutionProvider"])


def bind_inputs(binding: onnxruntime.IOBinding, **tensors: Tensor) -> None:
    """Have the graph read these contiguous tensors where they are; who binds them has to keep them."""
    for name, tensor in tensors.items():
        binding.bind_input(name, "cpu", 0, _TYPES[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())


def bind_outputs(binding: onnxruntime.IOBinding, **tensors: Tensor) -> None:
    """Have the graph write into these contiguous tensors."""
    for name, tensor in tensors.items():
        binding.bind_output(name, "cpu", 0, _TYPES[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
