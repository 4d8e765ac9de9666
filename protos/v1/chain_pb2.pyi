from isthmus.protos.v1 import stage_pb2 as _stage_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Row(_message.Message):
    __slots__ = ("sequence", "position", "count", "adapter", "long")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    LONG_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    position: int
    count: int
    adapter: int
    long: bool
    def __init__(self, sequence: _Optional[int] = ..., position: _Optional[int] = ..., count: _Optional[int] = ..., adapter: _Optional[int] = ..., long: _Optional[bool] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("job", "first", "last", "digest", "sequences", "tokens", "runtime", "codecs", "process", "tells_spent")
    JOB_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    RUNTIME_FIELD_NUMBER: _ClassVar[int]
    CODECS_FIELD_NUMBER: _ClassVar[int]
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    TELLS_SPENT_FIELD_NUMBER: _ClassVar[int]
    job: str
    first: int
    last: int
    digest: str
    sequences: int
    tokens: int
    runtime: str
    codecs: _containers.RepeatedScalarFieldContainer[str]
    process: int
    tells_spent: bool
    def __init__(self, job: _Optional[str] = ..., first: _Optional[int] = ..., last: _Optional[int] = ..., digest: _Optional[str] = ..., sequences: _Optional[int] = ..., tokens: _Optional[int] = ..., runtime: _Optional[str] = ..., codecs: _Optional[_Iterable[str]] = ..., process: _Optional[int] = ..., tells_spent: _Optional[bool] = ...) -> None: ...

class Agreed(_message.Message):
    __slots__ = ("codec", "seed")
    CODEC_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    codec: str
    seed: int
    def __init__(self, codec: _Optional[str] = ..., seed: _Optional[int] = ...) -> None: ...

class Batch(_message.Message):
    __slots__ = ("id", "rows", "hidden")
    ID_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    id: int
    rows: _containers.RepeatedCompositeFieldContainer[Row]
    hidden: _stage_pb2.Tensor
    def __init__(self, id: _Optional[int] = ..., rows: _Optional[_Iterable[_Union[Row, _Mapping]]] = ..., hidden: _Optional[_Union[_stage_pb2.Tensor, _Mapping]] = ...) -> None: ...

class Forget(_message.Message):
    __slots__ = ("sequences",)
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    sequences: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, sequences: _Optional[_Iterable[int]] = ...) -> None: ...

class Result(_message.Message):
    __slots__ = ("id", "hidden", "error", "bad_position", "computing_seconds", "coding_seconds")
    ID_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    BAD_POSITION_FIELD_NUMBER: _ClassVar[int]
    COMPUTING_SECONDS_FIELD_NUMBER: _ClassVar[int]
    CODING_SECONDS_FIELD_NUMBER: _ClassVar[int]
    id: int
    hidden: _stage_pb2.Tensor
    error: str
    bad_position: bool
    computing_seconds: float
    coding_seconds: float
    def __init__(self, id: _Optional[int] = ..., hidden: _Optional[_Union[_stage_pb2.Tensor, _Mapping]] = ..., error: _Optional[str] = ..., bad_position: _Optional[bool] = ..., computing_seconds: _Optional[float] = ..., coding_seconds: _Optional[float] = ...) -> None: ...

class AskSpent(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Spent(_message.Message):
    __slots__ = ("seconds", "peak_bytes", "accelerator_peak_bytes", "energy_joules", "energy_source", "accelerator_energy_joules", "accelerator_energy_source")
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    ACCELERATOR_PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    ENERGY_JOULES_FIELD_NUMBER: _ClassVar[int]
    ENERGY_SOURCE_FIELD_NUMBER: _ClassVar[int]
    ACCELERATOR_ENERGY_JOULES_FIELD_NUMBER: _ClassVar[int]
    ACCELERATOR_ENERGY_SOURCE_FIELD_NUMBER: _ClassVar[int]
    seconds: float
    peak_bytes: int
    accelerator_peak_bytes: int
    energy_joules: float
    energy_source: str
    accelerator_energy_joules: float
    accelerator_energy_source: str
    def __init__(self, seconds: _Optional[float] = ..., peak_bytes: _Optional[int] = ..., accelerator_peak_bytes: _Optional[int] = ..., energy_joules: _Optional[float] = ..., energy_source: _Optional[str] = ..., accelerator_energy_joules: _Optional[float] = ..., accelerator_energy_source: _Optional[str] = ...) -> None: ...

class Leaving(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class UserHello(_message.Message):
    __slots__ = ("job", "first", "digest", "sequences", "session")
    JOB_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    job: str
    first: int
    digest: str
    sequences: int
    session: str
    def __init__(self, job: _Optional[str] = ..., first: _Optional[int] = ..., digest: _Optional[str] = ..., sequences: _Optional[int] = ..., session: _Optional[str] = ...) -> None: ...

class FromHolder(_message.Message):
    __slots__ = ("hello", "result", "leaving", "spent")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    SPENT_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    result: Result
    leaving: Leaving
    spent: Spent
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., result: _Optional[_Union[Result, _Mapping]] = ..., leaving: _Optional[_Union[Leaving, _Mapping]] = ..., spent: _Optional[_Union[Spent, _Mapping]] = ...) -> None: ...

class ToHolder(_message.Message):
    __slots__ = ("agreed", "batch", "forget", "user", "ask_spent")
    AGREED_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    FORGET_FIELD_NUMBER: _ClassVar[int]
    USER_FIELD_NUMBER: _ClassVar[int]
    ASK_SPENT_FIELD_NUMBER: _ClassVar[int]
    agreed: Agreed
    batch: Batch
    forget: Forget
    user: UserHello
    ask_spent: AskSpent
    def __init__(self, agreed: _Optional[_Union[Agreed, _Mapping]] = ..., batch: _Optional[_Union[Batch, _Mapping]] = ..., forget: _Optional[_Union[Forget, _Mapping]] = ..., user: _Optional[_Union[UserHello, _Mapping]] = ..., ask_spent: _Optional[_Union[AskSpent, _Mapping]] = ...) -> None: ...
