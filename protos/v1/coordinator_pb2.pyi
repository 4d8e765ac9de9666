from isthmus.protos.v1 import events_pb2 as _events_pb2
from isthmus.protos.v1 import stage_pb2 as _stage_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union
from isthmus.protos.v1.events_pb2 import Event as Event
from isthmus.protos.v1.events_pb2 import StateChanged as StateChanged
from isthmus.protos.v1.events_pb2 import TaskState as TaskState
from isthmus.protos.v1.events_pb2 import LogLine as LogLine
from isthmus.protos.v1.events_pb2 import JobFinished as JobFinished
from isthmus.protos.v1.events_pb2 import JobFailed as JobFailed
from isthmus.protos.v1.events_pb2 import DeviceJoined as DeviceJoined
from isthmus.protos.v1.events_pb2 import DeviceLeft as DeviceLeft
from isthmus.protos.v1.events_pb2 import TrainingStarted as TrainingStarted
from isthmus.protos.v1.events_pb2 import StepDone as StepDone
from isthmus.protos.v1.events_pb2 import Evaluated as Evaluated
from isthmus.protos.v1.events_pb2 import Aggregated as Aggregated
from isthmus.protos.v1.events_pb2 import CheckpointSaved as CheckpointSaved
from isthmus.protos.v1.events_pb2 import ShapeChosen as ShapeChosen
from isthmus.protos.v1.events_pb2 import ModulesChanged as ModulesChanged
from isthmus.protos.v1.events_pb2 import ServingPlanned as ServingPlanned
from isthmus.protos.v1.events_pb2 import ServingStarted as ServingStarted
from isthmus.protos.v1.events_pb2 import HolderJoined as HolderJoined
from isthmus.protos.v1.events_pb2 import HolderLeft as HolderLeft
from isthmus.protos.v1.events_pb2 import HolderTookOver as HolderTookOver
from isthmus.protos.v1.events_pb2 import JobState as JobState

DESCRIPTOR: _descriptor.FileDescriptor
JOB_STATE_UNSPECIFIED: _events_pb2.JobState
WAITING: _events_pb2.JobState
PREPARING: _events_pb2.JobState
RUNNING: _events_pb2.JobState
SUCCEEDED: _events_pb2.JobState
FAILED: _events_pb2.JobState
CANCELLED: _events_pb2.JobState
INTERRUPTED: _events_pb2.JobState

class EnrollRequest(_message.Message):
    __slots__ = ("token", "csr")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    CSR_FIELD_NUMBER: _ClassVar[int]
    token: str
    csr: bytes
    def __init__(self, token: _Optional[str] = ..., csr: _Optional[bytes] = ...) -> None: ...

class EnrollReply(_message.Message):
    __slots__ = ("name", "certificate", "control_port")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    CONTROL_PORT_FIELD_NUMBER: _ClassVar[int]
    name: str
    certificate: bytes
    control_port: int
    def __init__(self, name: _Optional[str] = ..., certificate: _Optional[bytes] = ..., control_port: _Optional[int] = ...) -> None: ...

class Dataset(_message.Message):
    __slots__ = ("name", "bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    bytes: int
    def __init__(self, name: _Optional[str] = ..., bytes: _Optional[int] = ...) -> None: ...

class Profile(_message.Message):
    __slots__ = ("version", "platform", "cores", "memory_bytes", "accelerator", "datasets", "task_kinds", "speeds", "link", "accelerator_bytes", "training_flops")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PLATFORM_FIELD_NUMBER: _ClassVar[int]
    CORES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    ACCELERATOR_FIELD_NUMBER: _ClassVar[int]
    DATASETS_FIELD_NUMBER: _ClassVar[int]
    TASK_KINDS_FIELD_NUMBER: _ClassVar[int]
    SPEEDS_FIELD_NUMBER: _ClassVar[int]
    LINK_FIELD_NUMBER: _ClassVar[int]
    ACCELERATOR_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRAINING_FLOPS_FIELD_NUMBER: _ClassVar[int]
    version: str
    platform: str
    cores: int
    memory_bytes: int
    accelerator: str
    datasets: _containers.RepeatedCompositeFieldContainer[Dataset]
    task_kinds: _containers.RepeatedScalarFieldContainer[str]
    speeds: _containers.RepeatedCompositeFieldContainer[Speed]
    link: _stage_pb2.Measured
    accelerator_bytes: int
    training_flops: float
    def __init__(self, version: _Optional[str] = ..., platform: _Optional[str] = ..., cores: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., accelerator: _Optional[str] = ..., datasets: _Optional[_Iterable[_Union[Dataset, _Mapping]]] = ..., task_kinds: _Optional[_Iterable[str]] = ..., speeds: _Optional[_Iterable[_Union[Speed, _Mapping]]] = ..., link: _Optional[_Union[_stage_pb2.Measured, _Mapping]] = ..., accelerator_bytes: _Optional[int] = ..., training_flops: _Optional[float] = ...) -> None: ...

class Speed(_message.Message):
    __slots__ = ("runtime", "weights", "bytes_per_second", "block_seconds", "batch_seconds")
    RUNTIME_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SECONDS_FIELD_NUMBER: _ClassVar[int]
    BATCH_SECONDS_FIELD_NUMBER: _ClassVar[int]
    runtime: str
    weights: str
    bytes_per_second: float
    block_seconds: float
    batch_seconds: float
    def __init__(self, runtime: _Optional[str] = ..., weights: _Optional[str] = ..., bytes_per_second: _Optional[float] = ..., block_seconds: _Optional[float] = ..., batch_seconds: _Optional[float] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DeviceMessage(_message.Message):
    __slots__ = ("profile", "heartbeat", "task")
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    profile: Profile
    heartbeat: Heartbeat
    task: _events_pb2.TaskState
    def __init__(self, profile: _Optional[_Union[Profile, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., task: _Optional[_Union[_events_pb2.TaskState, _Mapping]] = ...) -> None: ...

class Task(_message.Message):
    __slots__ = ("id", "job", "spec", "stage_address", "first_block", "last_block", "shape")
    ID_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    STAGE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    LAST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    id: str
    job: str
    spec: JobSpec
    stage_address: str
    first_block: int
    last_block: int
    shape: _stage_pb2.Shape
    def __init__(self, id: _Optional[str] = ..., job: _Optional[str] = ..., spec: _Optional[_Union[JobSpec, _Mapping]] = ..., stage_address: _Optional[str] = ..., first_block: _Optional[int] = ..., last_block: _Optional[int] = ..., shape: _Optional[_Union[_stage_pb2.Shape, _Mapping]] = ...) -> None: ...

class CancelTask(_message.Message):
    __slots__ = ("id", "reason")
    ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    id: str
    reason: str
    def __init__(self, id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("name", "heartbeat_seconds")
    NAME_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    name: str
    heartbeat_seconds: int
    def __init__(self, name: _Optional[str] = ..., heartbeat_seconds: _Optional[int] = ...) -> None: ...

class CoordinatorMessage(_message.Message):
    __slots__ = ("welcome", "task", "cancel")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    task: Task
    cancel: CancelTask
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., task: _Optional[_Union[Task, _Mapping]] = ..., cancel: _Optional[_Union[CancelTask, _Mapping]] = ...) -> None: ...

class Blob(_message.Message):
    __slots__ = ("digest", "size")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    digest: str
    size: int
    def __init__(self, digest: _Optional[str] = ..., size: _Optional[int] = ...) -> None: ...

class TensorEntry(_message.Message):
    __slots__ = ("name", "dtype", "shape", "blob")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    BLOB_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    blob: Blob
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., blob: _Optional[_Union[Blob, _Mapping]] = ...) -> None: ...

class FileEntry(_message.Message):
    __slots__ = ("name", "blob")
    NAME_FIELD_NUMBER: _ClassVar[int]
    BLOB_FIELD_NUMBER: _ClassVar[int]
    name: str
    blob: Blob
    def __init__(self, name: _Optional[str] = ..., blob: _Optional[_Union[Blob, _Mapping]] = ...) -> None: ...

class Manifest(_message.Message):
    __slots__ = ("files", "tensors")
    FILES_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    files: _containers.RepeatedCompositeFieldContainer[FileEntry]
    tensors: _containers.RepeatedCompositeFieldContainer[TensorEntry]
    def __init__(self, files: _Optional[_Iterable[_Union[FileEntry, _Mapping]]] = ..., tensors: _Optional[_Iterable[_Union[TensorEntry, _Mapping]]] = ...) -> None: ...

class ManifestRequest(_message.Message):
    __slots__ = ("job", "adapter", "user", "blocks")
    JOB_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    USER_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    job: str
    adapter: str
    user: bool
    blocks: int
    def __init__(self, job: _Optional[str] = ..., adapter: _Optional[str] = ..., user: _Optional[bool] = ..., blocks: _Optional[int] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("job", "digest", "offset", "user", "blocks")
    JOB_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    USER_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    job: str
    digest: str
    offset: int
    user: bool
    blocks: int
    def __init__(self, job: _Optional[str] = ..., digest: _Optional[str] = ..., offset: _Optional[int] = ..., user: _Optional[bool] = ..., blocks: _Optional[int] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class FindServedRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class Served(_message.Message):
    __slots__ = ("job", "gateway", "serving")
    JOB_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_FIELD_NUMBER: _ClassVar[int]
    SERVING_FIELD_NUMBER: _ClassVar[int]
    job: str
    gateway: str
    serving: str
    def __init__(self, job: _Optional[str] = ..., gateway: _Optional[str] = ..., serving: _Optional[str] = ...) -> None: ...

class JobSpec(_message.Message):
    __slots__ = ("method", "model", "dataset", "devices", "device_count", "training", "wait_seconds", "serving")
    METHOD_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DATASET_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_COUNT_FIELD_NUMBER: _ClassVar[int]
    TRAINING_FIELD_NUMBER: _ClassVar[int]
    WAIT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    SERVING_FIELD_NUMBER: _ClassVar[int]
    method: str
    model: str
    dataset: str
    devices: _containers.RepeatedScalarFieldContainer[str]
    device_count: int
    training: str
    wait_seconds: float
    serving: str
    def __init__(self, method: _Optional[str] = ..., model: _Optional[str] = ..., dataset: _Optional[str] = ..., devices: _Optional[_Iterable[str]] = ..., device_count: _Optional[int] = ..., training: _Optional[str] = ..., wait_seconds: _Optional[float] = ..., serving: _Optional[str] = ...) -> None: ...

class Job(_message.Message):
    __slots__ = ("id", "spec", "state", "message", "created", "step", "steps", "checkpoint_step", "report", "devices")
    ID_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_STEP_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    id: str
    spec: JobSpec
    state: _events_pb2.JobState
    message: str
    created: float
    step: int
    steps: int
    checkpoint_step: int
    report: str
    devices: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, id: _Optional[str] = ..., spec: _Optional[_Union[JobSpec, _Mapping]] = ..., state: _Optional[_Union[_events_pb2.JobState, str]] = ..., message: _Optional[str] = ..., created: _Optional[float] = ..., step: _Optional[int] = ..., steps: _Optional[int] = ..., checkpoint_step: _Optional[int] = ..., report: _Optional[str] = ..., devices: _Optional[_Iterable[str]] = ...) -> None: ...

class SubmitJobRequest(_message.Message):
    __slots__ = ("spec", "resume")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    spec: JobSpec
    resume: str
    def __init__(self, spec: _Optional[_Union[JobSpec, _Mapping]] = ..., resume: _Optional[str] = ...) -> None: ...

class JobRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class JobReport(_message.Message):
    __slots__ = ("report",)
    REPORT_FIELD_NUMBER: _ClassVar[int]
    report: str
    def __init__(self, report: _Optional[str] = ...) -> None: ...

class ListJobsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListJobsReply(_message.Message):
    __slots__ = ("jobs",)
    JOBS_FIELD_NUMBER: _ClassVar[int]
    jobs: _containers.RepeatedCompositeFieldContainer[Job]
    def __init__(self, jobs: _Optional[_Iterable[_Union[Job, _Mapping]]] = ...) -> None: ...

class WatchJobRequest(_message.Message):
    __slots__ = ("id", "after")
    ID_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    id: str
    after: int
    def __init__(self, id: _Optional[str] = ..., after: _Optional[int] = ...) -> None: ...

class Device(_message.Message):
    __slots__ = ("name", "connected", "revoked", "last_seen", "profile", "job")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_FIELD_NUMBER: _ClassVar[int]
    REVOKED_FIELD_NUMBER: _ClassVar[int]
    LAST_SEEN_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    name: str
    connected: bool
    revoked: bool
    last_seen: float
    profile: Profile
    job: str
    def __init__(self, name: _Optional[str] = ..., connected: _Optional[bool] = ..., revoked: _Optional[bool] = ..., last_seen: _Optional[float] = ..., profile: _Optional[_Union[Profile, _Mapping]] = ..., job: _Optional[str] = ...) -> None: ...

class ListDevicesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListDevicesReply(_message.Message):
    __slots__ = ("devices",)
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    devices: _containers.RepeatedCompositeFieldContainer[Device]
    def __init__(self, devices: _Optional[_Iterable[_Union[Device, _Mapping]]] = ...) -> None: ...

class CreateTokenRequest(_message.Message):
    __slots__ = ("name", "lifetime_seconds")
    NAME_FIELD_NUMBER: _ClassVar[int]
    LIFETIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    name: str
    lifetime_seconds: float
    def __init__(self, name: _Optional[str] = ..., lifetime_seconds: _Optional[float] = ...) -> None: ...

class CreateTokenReply(_message.Message):
    __slots__ = ("token", "enrolment_port", "expires")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    ENROLMENT_PORT_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_FIELD_NUMBER: _ClassVar[int]
    token: str
    enrolment_port: int
    expires: float
    def __init__(self, token: _Optional[str] = ..., enrolment_port: _Optional[int] = ..., expires: _Optional[float] = ...) -> None: ...

class RevokeDeviceRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class RevokeDeviceReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ExportedFile(_message.Message):
    __slots__ = ("name", "data")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    name: str
    data: bytes
    def __init__(self, name: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...
