"""The last aggregation: what a job goes on from when nobody is left, or when it is resumed."""

from __future__ import annotations

from torch import Tensor

from isthmus.protos.v1.events_pb2 import CheckpointSaved, Event
from isthmus.split.errors import WrongState
from isthmus.split.job.config import TrainingConfig
from isthmus.split.job.events import Tell
from isthmus.split.training.checkpoint import Checkpoint, CheckpointFolder
from isthmus.split.training.progress import JobProgress
from isthmus.split.training.steps import HostSteps


class Recovery:
    """point: the last aggregation; before the first, what the job began with. folder: None keeps nothing on disk."""

    def __init__(
        self,
        steps: HostSteps,
        progress: JobProgress,
        config: TrainingConfig,
        folder: CheckpointFolder | None,
        tell: Tell,
    ) -> None:
        self._steps, self._progress, self._config = steps, progress, config
        self._folder, self._tell = folder, tell
        self.point = Checkpoint(0, {}, {}, None, [])

    def begin(self, kept: Checkpoint | None) -> None:
        """With a checkpoint to go on from; None: from the start. Raises WrongState for one of another model."""
        if kept is None:
            self.point = self._snapshot(0, None)
            return
        if kept.stage_digest != self._steps.digest:
            raise WrongState("the model's files have changed since the checkpoint was written: put the old ones back")
        self.point = kept
        self.go_back()

    def go_back(self) -> None:
        """To the last aggregation. Raises WrongState for a checkpoint of another model or of other options."""
        self._steps.restore(self.point)
        self._progress.go_to(self.point.step, self.point.losses)

    def keep(self, step: int, average: Tensor | None) -> None:
        """The job after `step` steps: on disk, where a checkpoint is due, before anyone has heard of it. average: the
        devices' adapter, flat. Raises WrongState for NaN or infinity."""
        point = self._snapshot(step, average)
        point.check_finite()
        self.point = point
        if self._config.checkpoints_after(step) and self._folder:
            self._folder.save(point)
            self._tell(Event(checkpoint=CheckpointSaved(step=step)))

    def _snapshot(self, step: int, average: Tensor | None) -> Checkpoint:
        point = Checkpoint(step, {}, {}, average, list(self._progress.losses), self._steps.digest)
        return self._steps.into(point)
