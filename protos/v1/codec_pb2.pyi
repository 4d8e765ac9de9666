from isthmus.protos.v1 import stage_pb2 as _stage_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class KeptTensor(_message.Message):
    __slots__ = ("key", "values")
    KEY_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    key: _containers.RepeatedScalarFieldContainer[int]
    values: _stage_pb2.Tensor
    def __init__(self, key: _Optional[_Iterable[int]] = ..., values: _Optional[_Union[_stage_pb2.Tensor, _Mapping]] = ...) -> None: ...

class KeptPart(_message.Message):
    __slots__ = ("numbers", "tensors")
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    numbers: _containers.RepeatedScalarFieldContainer[float]
    tensors: _containers.RepeatedCompositeFieldContainer[KeptTensor]
    def __init__(self, numbers: _Optional[_Iterable[float]] = ..., tensors: _Optional[_Iterable[_Union[KeptTensor, _Mapping]]] = ...) -> None: ...

class CodecState(_message.Message):
    __slots__ = ("seed", "count", "bits_a_value", "parts", "matrices")
    class PartsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: KeptPart
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[KeptPart, _Mapping]] = ...) -> None: ...
    SEED_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    BITS_A_VALUE_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    MATRICES_FIELD_NUMBER: _ClassVar[int]
    seed: int
    count: int
    bits_a_value: float
    parts: _containers.MessageMap[str, KeptPart]
    matrices: _containers.RepeatedCompositeFieldContainer[CodecState]
    def __init__(self, seed: _Optional[int] = ..., count: _Optional[int] = ..., bits_a_value: _Optional[float] = ..., parts: _Optional[_Mapping[str, KeptPart]] = ..., matrices: _Optional[_Iterable[_Union[CodecState, _Mapping]]] = ...) -> None: ...

class StreamState(_message.Message):
    __slots__ = ("stream", "site", "state")
    STREAM_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    stream: str
    site: int
    state: CodecState
    def __init__(self, stream: _Optional[str] = ..., site: _Optional[int] = ..., state: _Optional[_Union[CodecState, _Mapping]] = ...) -> None: ...

class SessionState(_message.Message):
    __slots__ = ("plan", "streams")
    PLAN_FIELD_NUMBER: _ClassVar[int]
    STREAMS_FIELD_NUMBER: _ClassVar[int]
    plan: _stage_pb2.Plan
    streams: _containers.RepeatedCompositeFieldContainer[StreamState]
    def __init__(self, plan: _Optional[_Union[_stage_pb2.Plan, _Mapping]] = ..., streams: _Optional[_Iterable[_Union[StreamState, _Mapping]]] = ...) -> None: ...
