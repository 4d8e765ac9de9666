"""Bytes as frames of zstd without its magic number; no frame makes a reader take more memory than it expects to."""

from __future__ import annotations

import zstandard

from isthmus.split.errors import CodecError

_FORMAT = zstandard.FORMAT_ZSTD1_MAGICLESS
_LEAST_WINDOW = 1 << 10  # of the format


def compressor(level: int) -> zstandard.ZstdCompressor:
    """A compressor for many frames, to be used by one thread."""
    parameters = zstandard.ZstdCompressionParameters.from_level(
        level, format=_FORMAT, write_content_size=True, write_checksum=False
    )
    return zstandard.ZstdCompressor(compression_params=parameters)


def compress(data: bytes, level: int) -> bytes:
    return compressor(level).compress(data)


def decompress(frame: bytes, size: int, decompressor: zstandard.ZstdDecompressor | None = None) -> bytes:
    """Exactly `size` bytes, or CodecError."""
    try:
        said = zstandard.get_frame_parameters(frame, format=_FORMAT)
        if said.content_size != size or said.window_size > max(size, _LEAST_WINDOW):
            raise CodecError(f"a zstd frame of {said.content_size} bytes where {size} have to be")
        if not size:
            return b""
        data = (decompressor or zstandard.ZstdDecompressor(format=_FORMAT)).decompress(
            frame, max_output_size=size, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise CodecError(f"zstd cannot read a frame: {error}") from error
    if len(data) != size:
        raise CodecError(f"a zstd frame of {len(data)} bytes where {size} have to be")
    return data


def decompressor() -> zstandard.ZstdDecompressor:
    """A decompressor for many frames, to be used by one thread."""
    return zstandard.ZstdDecompressor(format=_FORMAT)


def bound(size: int) -> int:
    """The most that a frame of `size` bytes takes: what it holds, a header, and 3 bytes a block of up to 128 KiB.
    zstd's own bound is larger for short data; it is for compressing in one pass."""
    return size + (size >> 8) + 64 + 18
