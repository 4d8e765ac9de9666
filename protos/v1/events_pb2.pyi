from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class JobState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    JOB_STATE_UNSPECIFIED: _ClassVar[JobState]
    WAITING: _ClassVar[JobState]
    PREPARING: _ClassVar[JobState]
    RUNNING: _ClassVar[JobState]
    SUCCEEDED: _ClassVar[JobState]
    FAILED: _ClassVar[JobState]
    CANCELLED: _ClassVar[JobState]
    INTERRUPTED: _ClassVar[JobState]
JOB_STATE_UNSPECIFIED: JobState
WAITING: JobState
PREPARING: JobState
RUNNING: JobState
SUCCEEDED: JobState
FAILED: JobState
CANCELLED: JobState
INTERRUPTED: JobState

class Event(_message.Message):
    __slots__ = ("number", "time", "device", "state", "task", "log", "finished", "failed", "joined", "left", "started", "step", "evaluation", "aggregation", "checkpoint", "shape", "modules", "plan", "serving", "holder_joined", "holder_left", "took_over")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    LOG_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    JOINED_FIELD_NUMBER: _ClassVar[int]
    LEFT_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_FIELD_NUMBER: _ClassVar[int]
    AGGREGATION_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    MODULES_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    SERVING_FIELD_NUMBER: _ClassVar[int]
    HOLDER_JOINED_FIELD_NUMBER: _ClassVar[int]
    HOLDER_LEFT_FIELD_NUMBER: _ClassVar[int]
    TOOK_OVER_FIELD_NUMBER: _ClassVar[int]
    number: int
    time: float
    device: str
    state: StateChanged
    task: TaskState
    log: LogLine
    finished: JobFinished
    failed: JobFailed
    joined: DeviceJoined
    left: DeviceLeft
    started: TrainingStarted
    step: StepDone
    evaluation: Evaluated
    aggregation: Aggregated
    checkpoint: CheckpointSaved
    shape: ShapeChosen
    modules: ModulesChanged
    plan: ServingPlanned
    serving: ServingStarted
    holder_joined: HolderJoined
    holder_left: HolderLeft
    took_over: HolderTookOver
    def __init__(self, number: _Optional[int] = ..., time: _Optional[float] = ..., device: _Optional[str] = ..., state: _Optional[_Union[StateChanged, _Mapping]] = ..., task: _Optional[_Union[TaskState, _Mapping]] = ..., log: _Optional[_Union[LogLine, _Mapping]] = ..., finished: _Optional[_Union[JobFinished, _Mapping]] = ..., failed: _Optional[_Union[JobFailed, _Mapping]] = ..., joined: _Optional[_Union[DeviceJoined, _Mapping]] = ..., left: _Optional[_Union[DeviceLeft, _Mapping]] = ..., started: _Optional[_Union[TrainingStarted, _Mapping]] = ..., step: _Optional[_Union[StepDone, _Mapping]] = ..., evaluation: _Optional[_Union[Evaluated, _Mapping]] = ..., aggregation: _Optional[_Union[Aggregated, _Mapping]] = ..., checkpoint: _Optional[_Union[CheckpointSaved, _Mapping]] = ..., shape: _Optional[_Union[ShapeChosen, _Mapping]] = ..., modules: _Optional[_Union[ModulesChanged, _Mapping]] = ..., plan: _Optional[_Union[ServingPlanned, _Mapping]] = ..., serving: _Optional[_Union[ServingStarted, _Mapping]] = ..., holder_joined: _Optional[_Union[HolderJoined, _Mapping]] = ..., holder_left: _Optional[_Union[HolderLeft, _Mapping]] = ..., took_over: _Optional[_Union[HolderTookOver, _Mapping]] = ...) -> None: ...

class StateChanged(_message.Message):
    __slots__ = ("state", "message", "resumed")
    STATE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FIELD_NUMBER: _ClassVar[int]
    state: JobState
    message: str
    resumed: bool
    def __init__(self, state: _Optional[_Union[JobState, str]] = ..., message: _Optional[str] = ..., resumed: _Optional[bool] = ...) -> None: ...

class TaskState(_message.Message):
    __slots__ = ("task", "state", "message")
    class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATE_UNSPECIFIED: _ClassVar[TaskState.State]
        PREPARING: _ClassVar[TaskState.State]
        RUNNING: _ClassVar[TaskState.State]
        DONE: _ClassVar[TaskState.State]
        FAILED: _ClassVar[TaskState.State]
        CANCELLED: _ClassVar[TaskState.State]
    STATE_UNSPECIFIED: TaskState.State
    PREPARING: TaskState.State
    RUNNING: TaskState.State
    DONE: TaskState.State
    FAILED: TaskState.State
    CANCELLED: TaskState.State
    TASK_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    task: str
    state: TaskState.State
    message: str
    def __init__(self, task: _Optional[str] = ..., state: _Optional[_Union[TaskState.State, str]] = ..., message: _Optional[str] = ...) -> None: ...

class LogLine(_message.Message):
    __slots__ = ("message",)
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    message: str
    def __init__(self, message: _Optional[str] = ...) -> None: ...

class JobFinished(_message.Message):
    __slots__ = ("step",)
    STEP_FIELD_NUMBER: _ClassVar[int]
    step: int
    def __init__(self, step: _Optional[int] = ...) -> None: ...

class JobFailed(_message.Message):
    __slots__ = ("message",)
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    message: str
    def __init__(self, message: _Optional[str] = ...) -> None: ...

class DeviceJoined(_message.Message):
    __slots__ = ("samples", "last_step")
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    LAST_STEP_FIELD_NUMBER: _ClassVar[int]
    samples: int
    last_step: int
    def __init__(self, samples: _Optional[int] = ..., last_step: _Optional[int] = ...) -> None: ...

class DeviceLeft(_message.Message):
    __slots__ = ("step", "done")
    STEP_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    step: int
    done: bool
    def __init__(self, step: _Optional[int] = ..., done: _Optional[bool] = ...) -> None: ...

class TrainingStarted(_message.Message):
    __slots__ = ("step",)
    STEP_FIELD_NUMBER: _ClassVar[int]
    step: int
    def __init__(self, step: _Optional[int] = ...) -> None: ...

class StepDone(_message.Message):
    __slots__ = ("step", "device_step", "loss", "tokens", "devices")
    STEP_FIELD_NUMBER: _ClassVar[int]
    DEVICE_STEP_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    step: int
    device_step: int
    loss: float
    tokens: int
    devices: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, step: _Optional[int] = ..., device_step: _Optional[int] = ..., loss: _Optional[float] = ..., tokens: _Optional[int] = ..., devices: _Optional[_Iterable[str]] = ...) -> None: ...

class Evaluated(_message.Message):
    __slots__ = ("step", "perplexity", "tokens", "devices")
    class DevicesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    STEP_FIELD_NUMBER: _ClassVar[int]
    PERPLEXITY_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    step: int
    perplexity: float
    tokens: int
    devices: _containers.ScalarMap[str, float]
    def __init__(self, step: _Optional[int] = ..., perplexity: _Optional[float] = ..., tokens: _Optional[int] = ..., devices: _Optional[_Mapping[str, float]] = ...) -> None: ...

class Aggregated(_message.Message):
    __slots__ = ("step", "method", "aggregation_error")
    STEP_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    AGGREGATION_ERROR_FIELD_NUMBER: _ClassVar[int]
    step: int
    method: str
    aggregation_error: float
    def __init__(self, step: _Optional[int] = ..., method: _Optional[str] = ..., aggregation_error: _Optional[float] = ...) -> None: ...

class CheckpointSaved(_message.Message):
    __slots__ = ("step",)
    STEP_FIELD_NUMBER: _ClassVar[int]
    step: int
    def __init__(self, step: _Optional[int] = ...) -> None: ...

class ShapeChosen(_message.Message):
    __slots__ = ("cut", "rank", "step_seconds", "deadline_seconds", "memory_bytes", "message")
    CUT_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    STEP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    cut: int
    rank: int
    step_seconds: float
    deadline_seconds: float
    memory_bytes: float
    message: str
    def __init__(self, cut: _Optional[int] = ..., rank: _Optional[int] = ..., step_seconds: _Optional[float] = ..., deadline_seconds: _Optional[float] = ..., memory_bytes: _Optional[float] = ..., message: _Optional[str] = ...) -> None: ...

class ModulesChanged(_message.Message):
    __slots__ = ("step", "killed", "revived", "active", "message")
    STEP_FIELD_NUMBER: _ClassVar[int]
    KILLED_FIELD_NUMBER: _ClassVar[int]
    REVIVED_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    step: int
    killed: _containers.RepeatedScalarFieldContainer[str]
    revived: _containers.RepeatedScalarFieldContainer[str]
    active: _containers.RepeatedScalarFieldContainer[str]
    message: str
    def __init__(self, step: _Optional[int] = ..., killed: _Optional[_Iterable[str]] = ..., revived: _Optional[_Iterable[str]] = ..., active: _Optional[_Iterable[str]] = ..., message: _Optional[str] = ...) -> None: ...

class ServingPlanned(_message.Message):
    __slots__ = ("stages", "tokens_per_second", "single", "single_tokens_per_second", "slower", "message")
    STAGES_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    SINGLE_FIELD_NUMBER: _ClassVar[int]
    SINGLE_TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    SLOWER_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    stages: str
    tokens_per_second: float
    single: str
    single_tokens_per_second: float
    slower: bool
    message: str
    def __init__(self, stages: _Optional[str] = ..., tokens_per_second: _Optional[float] = ..., single: _Optional[str] = ..., single_tokens_per_second: _Optional[float] = ..., slower: _Optional[bool] = ..., message: _Optional[str] = ...) -> None: ...

class ServingStarted(_message.Message):
    __slots__ = ("url", "model")
    URL_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    url: str
    model: str
    def __init__(self, url: _Optional[str] = ..., model: _Optional[str] = ...) -> None: ...

class HolderJoined(_message.Message):
    __slots__ = ("span", "holder", "runtime")
    SPAN_FIELD_NUMBER: _ClassVar[int]
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    RUNTIME_FIELD_NUMBER: _ClassVar[int]
    span: str
    holder: str
    runtime: str
    def __init__(self, span: _Optional[str] = ..., holder: _Optional[str] = ..., runtime: _Optional[str] = ...) -> None: ...

class HolderLeft(_message.Message):
    __slots__ = ("span", "holder")
    SPAN_FIELD_NUMBER: _ClassVar[int]
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    span: str
    holder: str
    def __init__(self, span: _Optional[str] = ..., holder: _Optional[str] = ...) -> None: ...

class HolderTookOver(_message.Message):
    __slots__ = ("span", "lost", "holder", "sequence", "tokens", "seconds", "message")
    SPAN_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    span: str
    lost: str
    holder: str
    sequence: int
    tokens: int
    seconds: float
    message: str
    def __init__(self, span: _Optional[str] = ..., lost: _Optional[str] = ..., holder: _Optional[str] = ..., sequence: _Optional[int] = ..., tokens: _Optional[int] = ..., seconds: _Optional[float] = ..., message: _Optional[str] = ...) -> None: ...
