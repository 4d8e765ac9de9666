from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Phase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PHASE_UNSPECIFIED: _ClassVar[Phase]
    OPEN: _ClassVar[Phase]
    FORWARD: _ClassVar[Phase]
    BACKWARD: _ClassVar[Phase]
    STEP: _ClassVar[Phase]
    AGGREGATE: _ClassVar[Phase]
    EVALUATE: _ClassVar[Phase]
    REPORT: _ClassVar[Phase]
    CLOSE: _ClassVar[Phase]
    PROBE: _ClassVar[Phase]
    MERGE: _ClassVar[Phase]
PHASE_UNSPECIFIED: Phase
OPEN: Phase
FORWARD: Phase
BACKWARD: Phase
STEP: Phase
AGGREGATE: Phase
EVALUATE: Phase
REPORT: Phase
CLOSE: Phase
PROBE: Phase
MERGE: Phase

class Tensor(_message.Message):
    __slots__ = ("codec", "dtype", "shape", "payload")
    CODEC_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    codec: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    payload: bytes
    def __init__(self, codec: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., payload: _Optional[bytes] = ...) -> None: ...

class Frame(_message.Message):
    __slots__ = ("job", "session", "step", "micro_batch", "phase", "tensor", "labels", "values", "open", "agreement", "plan", "measured", "probe", "wanted", "frozen", "shape", "site", "trained", "applied")
    class ValuesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    JOB_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    MICRO_BATCH_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    AGREEMENT_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    MEASURED_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    WANTED_FIELD_NUMBER: _ClassVar[int]
    FROZEN_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    TRAINED_FIELD_NUMBER: _ClassVar[int]
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    job: str
    session: str
    step: int
    micro_batch: int
    phase: Phase
    tensor: Tensor
    labels: Tensor
    values: _containers.ScalarMap[str, float]
    open: Open
    agreement: Agreement
    plan: Plan
    measured: Measured
    probe: Probe
    wanted: bytes
    frozen: Frozen
    shape: Shape
    site: int
    trained: bytes
    applied: bytes
    def __init__(self, job: _Optional[str] = ..., session: _Optional[str] = ..., step: _Optional[int] = ..., micro_batch: _Optional[int] = ..., phase: _Optional[_Union[Phase, str]] = ..., tensor: _Optional[_Union[Tensor, _Mapping]] = ..., labels: _Optional[_Union[Tensor, _Mapping]] = ..., values: _Optional[_Mapping[str, float]] = ..., open: _Optional[_Union[Open, _Mapping]] = ..., agreement: _Optional[_Union[Agreement, _Mapping]] = ..., plan: _Optional[_Union[Plan, _Mapping]] = ..., measured: _Optional[_Union[Measured, _Mapping]] = ..., probe: _Optional[_Union[Probe, _Mapping]] = ..., wanted: _Optional[bytes] = ..., frozen: _Optional[_Union[Frozen, _Mapping]] = ..., shape: _Optional[_Union[Shape, _Mapping]] = ..., site: _Optional[int] = ..., trained: _Optional[bytes] = ..., applied: _Optional[bytes] = ...) -> None: ...

class Shape(_message.Message):
    __slots__ = ("cut", "rank")
    CUT_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    cut: int
    rank: int
    def __init__(self, cut: _Optional[int] = ..., rank: _Optional[int] = ...) -> None: ...

class Frozen(_message.Message):
    __slots__ = ("replaces", "ranks", "values")
    class RanksEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    REPLACES_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    replaces: bool
    ranks: _containers.ScalarMap[str, int]
    values: Tensor
    def __init__(self, replaces: _Optional[bool] = ..., ranks: _Optional[_Mapping[str, int]] = ..., values: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class Measured(_message.Message):
    __slots__ = ("round_trip_seconds", "up_bytes_per_second", "down_bytes_per_second", "codec_seconds", "compute_seconds")
    class CodecSecondsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class ComputeSecondsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    ROUND_TRIP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    UP_BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    DOWN_BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    CODEC_SECONDS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    round_trip_seconds: float
    up_bytes_per_second: float
    down_bytes_per_second: float
    codec_seconds: _containers.ScalarMap[str, float]
    compute_seconds: _containers.ScalarMap[str, float]
    def __init__(self, round_trip_seconds: _Optional[float] = ..., up_bytes_per_second: _Optional[float] = ..., down_bytes_per_second: _Optional[float] = ..., codec_seconds: _Optional[_Mapping[str, float]] = ..., compute_seconds: _Optional[_Mapping[str, float]] = ...) -> None: ...

class Plan(_message.Message):
    __slots__ = ("micro_batches", "depth", "codecs", "seed")
    class CodecsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    MICRO_BATCHES_FIELD_NUMBER: _ClassVar[int]
    DEPTH_FIELD_NUMBER: _ClassVar[int]
    CODECS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    micro_batches: int
    depth: int
    codecs: _containers.ScalarMap[str, str]
    seed: int
    def __init__(self, micro_batches: _Optional[int] = ..., depth: _Optional[int] = ..., codecs: _Optional[_Mapping[str, str]] = ..., seed: _Optional[int] = ...) -> None: ...

class Probe(_message.Message):
    __slots__ = ("filling", "answer_bytes")
    FILLING_FIELD_NUMBER: _ClassVar[int]
    ANSWER_BYTES_FIELD_NUMBER: _ClassVar[int]
    filling: bytes
    answer_bytes: int
    def __init__(self, filling: _Optional[bytes] = ..., answer_bytes: _Optional[int] = ...) -> None: ...

class Open(_message.Message):
    __slots__ = ("codecs", "samples", "stage_digest", "last_step", "adapter_values", "shape")
    CODECS_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    STAGE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    LAST_STEP_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_VALUES_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    codecs: _containers.RepeatedScalarFieldContainer[str]
    samples: int
    stage_digest: str
    last_step: int
    adapter_values: int
    shape: Shape
    def __init__(self, codecs: _Optional[_Iterable[str]] = ..., samples: _Optional[int] = ..., stage_digest: _Optional[str] = ..., last_step: _Optional[int] = ..., adapter_values: _Optional[int] = ..., shape: _Optional[_Union[Shape, _Mapping]] = ...) -> None: ...

class Agreement(_message.Message):
    __slots__ = ("start_step", "batch_size", "sequence_length", "hidden_size", "adapter_values")
    START_STEP_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_LENGTH_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_VALUES_FIELD_NUMBER: _ClassVar[int]
    start_step: int
    batch_size: int
    sequence_length: int
    hidden_size: int
    adapter_values: int
    def __init__(self, start_step: _Optional[int] = ..., batch_size: _Optional[int] = ..., sequence_length: _Optional[int] = ..., hidden_size: _Optional[int] = ..., adapter_values: _Optional[int] = ...) -> None: ...
