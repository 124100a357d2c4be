"""What a method on images stands on: the images, who answers for them, and a student that is built, judged and exported.

recipes/logits/dkd.py shows its use. A method that needs more (two students, teachers that are asked for features, other batches) takes
the parts of kd_core/images and kd_core/cache/images.py that stand behind it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from kd_core.cache import images as cached
from kd_core.images import batches, classifiers, evaluation
from kd_core.images.flags import ClassifierFlags, TeacherViewFlags
from kd_core.images.resnets import average_batch_norm
from kd_core.images.sources import ImageSet, Split
from kd_core.teachers.flags import TeacherFlags
from kd_core.teachers.pool import Ask
from kd_core.training.engine import Engine
from kd_core.training.loop import Run


@dataclass(frozen=True)
class Flags(TeacherFlags, TeacherViewFlags, ClassifierFlags):
    """A classifier, and teachers that may be models or caches. `--preset imagenet`."""


class Task:
    """The images of a run and their teachers.

    Args:
        run: of a recipe whose Config has `Flags`.
        prepare: `cached.prepare`, or what checks and reads more beside it.
        ask: what teachers are asked for in place of logits, as of `pool.gather`.

    Attributes:
        data: the images; `data.classes` are their names.
        teachers: who answers.

    Raises:
        FileNotFoundError, ValueError: as `kd_core.cache.images.prepare` and `gather`.
    """

    def __init__(
        self,
        run: Run[Any],
        prepare: Callable[[Any], tuple[ImageSet, dict[str, int]]] = cached.prepare,
        ask: Ask | None = None,
    ) -> None:
        self._run, self._cfg = run, run.cfg
        self.data, self._views = run.prepare(prepare)
        self.teachers = cached.gather(run, self.data, self.score, ask=ask)

    def score(self, model: Any, shaped: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """Loss, accuracy and calibration of `model` on the validation images; `shaped` as of `evaluation.evaluate`."""
        return evaluation.evaluate(self._cfg, self.data, model, shaped=shaped)

    def student(self, name: str = "", engine: str = "student", *, subclasses: int = 1) -> Engine:
        """The engine of --student, a classifier of the data's classes, with the flags' SGD.

        Args:
            name: another network than --student, and `engine` its name in the log, where a method trains two.
            subclasses: outputs for each class.
        """
        shape = {"seed": self._cfg.seed, "subclasses": subclasses}
        model = classifiers.build_student(name or self._cfg.student, self.data.classes, **shape)
        return self._run.engine(model, classifiers.sgd(self._cfg, model), name=engine, after=average_batch_norm)

    def batches(self, train: Split | None = None, part: range | None = None) -> Iterator[batches.Step]:
        """Of training images, one a step; as the caches of --teachers saw them.

        Args:
            train: other images than the data's, and `part` the steps that see them.
        """
        data = self.data if train is None else replace(self.data, train=train)
        return batches.batches(self._run, data, part, **self._views)

    def export(self, student: Engine) -> None:
        """Writes the classifier into the run's hf/; call on every rank."""
        classifiers.export(self._cfg, student, self.data.classes, self._run.folder / "hf")
