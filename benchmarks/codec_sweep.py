"""Bits against error: pipelines over the range of their main parameter, and a picture of that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.codec_baselines import Method, Ours, others
from benchmarks.codec_bounds import decibels, gaussian_bits, water_filling
from benchmarks.codec_streams import Passed
from isthmus.split.codecs import parse

_STEPS = (0.03, 0.06, 0.13, 0.25, 0.5, 1, 2)
_SHARES = (0.02, 0.05, 0.1, 0.2, 0.4)
_LINES = {
    "klt, uniform, range": [f"klt,uniform:step={step}:per=tensor,range" for step in _STEPS],
    "klt, uniform, zstd": [f"klt,uniform:step={step}:per=tensor,zstd" for step in _STEPS],
    "hadamard, uniform, zstd": [f"hadamard,uniform:step={step}:per=tensor,zstd" for step in _STEPS],
    "klt, uniform:stochastic, range": [f"klt,uniform:step={step}:per=tensor:stochastic,range" for step in _STEPS],
    "hadamard, int2 to int8": [f"hadamard,int{bits}" for bits in (2, 3, 4, 8)],
    "int2 to int8": [f"int{bits}" for bits in (2, 3, 4, 8)],
    "topk": [f"topk:{share}" for share in _SHARES],
    "fp8": ["fp8"],
}
_QUICK = {"hadamard, int2 to int8": ["hadamard,int2", "hadamard,int4"], "fp8": ["fp8"]}
_WARM_UP = 16  # tensors before those that count
_ERRORS = [10 ** (-share / 20) for share in range(101)]  # 0 to -50 dB

Point = dict[str, Any]


def sweep(passed: Sequence[Passed], measured: int, quick: bool) -> dict[str, list[Point]]:
    """Name of a line -> its points. The last `measured` tensors count, after _WARM_UP others."""
    lines: dict[str, list[Method]] = {
        name: [Ours(parse(codec)) for codec in codecs] for name, codecs in (_QUICK if quick else _LINES).items()
    }
    lines |= {method.name: [method] for method in others()}
    used = passed[-_WARM_UP - measured :]
    return {name: [_point(method, used, measured) for method in methods] for name, methods in lines.items()}


def bounds(eigenvalues: Tensor) -> dict[str, list[float]]:
    """Bits a value at each error, of white Gaussian values and of Gaussian vectors with these second moments."""
    return {
        "nmse_db": [decibels(error) for error in _ERRORS],
        "gaussian_bits": [gaussian_bits(error) for error in _ERRORS],
        "water_filling_bits": [water_filling(eigenvalues, error) for error in _ERRORS],
    }


def draw(
    path: Path,
    lines: Mapping[str, Mapping[str, list[Point]]],
    limits: Mapping[str, Mapping[str, list[float]]],
    title: str,
) -> None:
    """One panel a stream, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(14, 10), sharex=True, sharey=True, layout="constrained")
    for axis, (stream, of_stream) in zip(axes.flat, lines.items(), strict=True):
        limit = limits[stream]
        axis.plot(limit["gaussian_bits"], limit["nmse_db"], "k--", label="bound, white Gaussian")
        axis.plot(limit["water_filling_bits"], limit["nmse_db"], "k-", label="bound, Gaussian of this covariance")
        for name, points in of_stream.items():
            bits, errors = [point["bits_a_value"] for point in points], [point["nmse_db"] for point in points]
            alone = len(points) == 1
            axis.plot(bits, errors, "*" if alone else "o-", markersize=10 if alone else 4, label=name)
        axis.set(title=stream.replace("_", " "), xlim=(0, 10), ylim=(-50, 2))
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("bits a value, as sent")
    for axis in axes[:, 0]:
        axis.set_ylabel("normalised mean squared error, dB")
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4)
    figure.suptitle(title)
    figure.savefig(path, dpi=100, format="png")
    pyplot.close(figure)


def _point(method: Method, passed: Sequence[Passed], measured: int) -> Point:
    bits, error, power = 0, 0.0, 0.0
    for index, each in enumerate(passed):
        payload = method.encode(each.tensor, each.keys)
        decoded = method.decode(payload, each.tensor.shape, each.keys)
        if index >= len(passed) - measured:
            bits += 8 * len(payload)
            error += float((decoded - each.tensor).double().square().sum())
            power += float(each.tensor.double().square().sum())
    values = sum(each.tensor.numel() for each in passed[-measured:])
    return {
        "codec": method.name,
        "bits_a_value": bits / values,
        "nmse": error / power,
        "nmse_db": decibels(error / power),
    }
