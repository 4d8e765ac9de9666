"""Recovery from the last aggregation, for a job that nobody is left in or that is resumed."""

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
    """The state that a job can go back to.

    point: the last aggregation or, before the first, what the job began with.
    folder: where checkpoints are written; None to write none.
    """

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
        """Begins with a checkpoint to go on from, or with None at the start.

        Raises WrongState for a checkpoint of another model.
        """
        if kept is None:
            self.point = self._snapshot(0, None)
            return
        if kept.stage_digest != self._steps.digest:
            raise WrongState("the model's files have changed since the checkpoint was written: put the old ones back")
        self.point = kept
        self.go_back()

    def go_back(self) -> None:
        """Goes back to the last aggregation. Raises WrongState for a checkpoint of another model or other options."""
        self._steps.restore(self.point)
        self._progress.go_to(self.point.step, self.point.losses)

    def keep(self, step: int, average: Tensor | None) -> None:
        """Keeps the job's state after `step` steps; a due checkpoint is on disk before anyone has heard of the step.

        average: the devices' adapter, flat; None where there is none.

        Raises WrongState for NaN or infinity.
        """
        point = self._snapshot(step, average)
        point.check_finite()
        self.point = point
        if self._config.checkpoints_after(step) and self._folder:
            self._folder.save(point)
            self._tell(Event(checkpoint=CheckpointSaved(step=step)))

    def _snapshot(self, step: int, average: Tensor | None) -> Checkpoint:
        point = Checkpoint(step, {}, {}, average, list(self._progress.losses), self._steps.digest)
        return self._steps.into(point)
