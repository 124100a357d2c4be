"""What a method on images stands on: the images, who answers for them, and a student that is built, judged and exported.

    with start(__file__, Config, typed, preset) as run:
        task = classification.Task(run)
        student = task.student()
        for step in run.steps(task.batches(), lambda: task.score(student)):
            train_step(run.cfg, student, task.teachers, step)
        task.export(student)
    return run.code

A method that needs more (two students, teachers that are asked for features, other batches) takes the parts it keeps.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kd_core.cache import images as cached
from kd_core.images import batches, classifiers, evaluation
from kd_core.images.flags import ClassifierFlags, TeacherViewFlags
from kd_core.images.resnets import average_batch_norm
from kd_core.teachers.flags import TeacherFlags
from kd_core.training.engine import Engine
from kd_core.training.loop import Run


@dataclass(frozen=True)
class Flags(TeacherFlags, TeacherViewFlags, ClassifierFlags):
    """A classifier, and teachers that may be models or caches. `--preset imagenet`."""


class Task:
    """The images of a run and their teachers.

    Args:
        run: of a recipe whose Config has `Flags`.
        asked: of `kd_core.teachers.pool.gather`, such as what teachers are asked for in place of logits.

    Attributes:
        data: the images; `data.classes` are their names.
        teachers: who answers.

    Raises:
        FileNotFoundError, ValueError: as `kd_core.cache.images.prepare` and `gather`.
    """

    def __init__(self, run: Run[Any], **asked: Any) -> None:
        self._run, self._cfg = run, run.cfg
        self.data, self._views = run.prepare(cached.prepare)
        self.teachers = cached.gather(run, self.data, self.score, **asked)

    def score(self, model: Any, *, prefix: str = "eval/") -> dict[str, float]:
        """Loss, accuracy and calibration of `model` on the validation images."""
        return evaluation.evaluate(self._cfg, self.data, model, prefix=prefix)

    def student(self, size: str = "", *, name: str = "student", **engine: Any) -> Engine:
        """The engine of a classifier of `size`, by default --student, with the flags' SGD.

        Args:
            name: of the engine in the run's checkpoints.
            engine: of `Run.engine`.
        """
        model = classifiers.build_student(size or self._cfg.student, self.data.classes, seed=self._cfg.seed)
        sgd = classifiers.sgd(self._cfg, model)
        return self._run.engine(model, sgd, name=name, after=average_batch_norm, **engine)

    def batches(self) -> Iterator[batches.Step]:
        """Of training images, one a step; as the caches of --teachers saw them."""
        return batches.batches(self._run, self.data, **self._views)

    def export(self, student: Engine, folder: str = "hf", *, part: str = "") -> None:
        """Writes the classifier into `folder` of the run's; call on every rank.

        Args:
            part: of the engine's module, where the classifier is a submodule.
        """
        classifiers.export(self._cfg, student, self.data.classes, self._run.folder / folder, part=part)
