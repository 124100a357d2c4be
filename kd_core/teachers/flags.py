"""The flags of a run that learns from teachers: who they are, when they answer, how much of the loss is theirs."""

import dataclasses
import math
from typing import ClassVar, Literal, NamedTuple

from kd_core.losses.distillation import Divergence, Ensemble
from kd_core.runs.flags import RunFlags
from kd_core.teachers.samplers import Sampler
from kd_core.teachers.sources import CACHE_PREFIX, is_model, matched

Placement = Literal["device", "host", "sharded", "zero3"]


class Window(NamedTuple):
    """When teachers answer: at every `every`-th step from `start` on and before `stop`, fractions of the run."""

    start: float
    stop: float
    every: int


@dataclasses.dataclass(frozen=True)
class TeacherFlags(RunFlags):
    """Who answers, and where their weights are. Without `WindowFlags` they answer at every step."""

    GROUP: ClassVar[str] = "teachers"
    teachers: tuple[str, ...] = ()
    """Models to distil from: run folders, Hugging Face folders or hub names; for BERTs also cache:DIR, counts:unigram."""
    sampler: Sampler = "uniform"
    """Who answers at a step: drawn uniform, weighted or per_rank; round_robin; curriculum, weak to strong; or all."""
    draws: int = 1
    """Teachers a step, without meaning for the sampler all; they answer as an ensemble."""
    teacher_weights: tuple[float, ...] = ()
    """Of weighted and curriculum, one a teacher; default: 1 / perplexity, measured before the first step."""
    ensemble: Ensemble = "probabilities"
    """What is averaged when several teachers answer."""
    teacher_placement: Placement = "device"
    """Weights on each GPU; in CPU memory, two of them on the GPU; one teacher a rank (for per_rank); or split by ZeRO-3."""
    teacher_deepspeed_config: str = "teacher_zero3_bf16.json"
    """For --teacher-placement zero3: a file of ds_configs/, or your own."""
    teacher_ahead: bool = False
    """On a GPU, run the teachers one micro-batch ahead on a side stream; the same results."""

    def __post_init__(self) -> None:
        teachers = (found for path in self.teachers for found in matched(path, self.out))
        object.__setattr__(self, "teachers", tuple(teachers))
        super().__post_init__()
        self.check("draws", self.draws >= 1, "at least 1")
        number, weights = len(self.teachers), self.teacher_weights
        placement, by_rank = self.teacher_placement, self.sampler == "per_rank"
        self.check("teacher_placement", placement != "sharded" or by_rank, "used with --sampler per_rank")
        on_device = placement in ("device", "sharded") or all(map(is_model, self.teachers))
        self.check("teacher_placement", on_device, "device for teachers that are no models")
        self.check("sampler", placement != "zero3" or not by_rank, "one that all ranks share, for zero3")
        most = 1 if placement == "sharded" else max(1, number)
        self.check("draws", self.draws <= most, f"at most the number of --teachers that a rank has, {most}")
        if weights:
            self.check("teacher_weights", self.sampler in ("weighted", "curriculum"), "given to weighted or curriculum")
            self.check("teacher_weights", len(weights) == number, f"one a teacher, {number}")
            self.check("teacher_weights", all(0 <= weight < math.inf for weight in weights), "finite, at least 0")
            above = sum(weight > 0 for weight in weights)
            self.check("teacher_weights", above >= self.draws, f"above 0 for at least --draws, {self.draws}")

    @property
    def distils(self) -> bool:
        """Whether any teacher is asked in the run."""
        return bool(self.teachers)

    @property
    def cached(self) -> bool:
        """Whether a teacher's answers come from a cache."""
        return any(path.startswith(CACHE_PREFIX) for path in self.teachers)

    @property
    def window(self) -> Window:
        """When teachers answer: by default always."""
        return Window(0.0, 1.0, 1)


@dataclasses.dataclass(frozen=True)
class WindowFlags(TeacherFlags):
    """A window of the run in which teachers answer; outside of it the method trains on labels alone."""

    GROUP: ClassVar[str] = "method"
    kd_start: float = 0.0
    """Start of the window, as a fraction of --steps."""
    kd_stop: float = 1.0
    """End of the window, as a fraction of --steps; after it the teachers' memory is freed."""
    kd_every: int = 1
    """Inside the window, distil on every so many-th step; the steps between have the weights of those outside."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("kd_every", self.kd_every >= 1, "at least 1")
        for name in ("kd_start", "kd_stop"):
            self.check(name, 0 <= getattr(self, name) <= 1, "in [0, 1]")
        self.check("kd_stop", self.kd_stop >= self.kd_start, f"at least --kd-start, {self.kd_start}")

    @property
    def window(self) -> Window:
        return Window(self.kd_start, self.kd_stop, self.kd_every)


@dataclasses.dataclass(frozen=True)
class DistillFlags(WindowFlags):
    """How much of the loss is the teachers', and at which temperature: for methods that mix a label and a teacher term."""

    GROUP: ClassVar[str] = "method"
    kd_ratio: float = 0.0
    """Weight of the teacher term inside the window, in [0, 1]; the labels get the rest."""
    temperature: float = 1.0
    """tau > 0; divides the logits of teacher and student in the teacher term."""
    kd_ratio_stop: float | None = None
    """The ratio at the end of the window, towards which it goes along --kd-ramp; default: constant."""
    temperature_stop: float | None = None
    """The temperature at the end of the window, towards which it goes along --kd-ramp; default: constant."""
    kd_ramp: Literal["linear", "cosine"] = "linear"
    """How --kd-ratio-stop and --temperature-stop are reached over the window."""
    label_weight_outside: float = 1.0
    """Weight of the label loss outside the window; inside it is 1 - kd_ratio."""
    divergence: Divergence = "forward_kl"
    """forward_kl: KL(teacher || student); reverse_kl: KL(student || teacher); jensen_shannon, skew_kl (both of
    equal shares, without a --beta), total_variation: kd_core/losses/divergences.py; mse: squared error of raw logits."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("kd_ratio", "kd_ratio_stop"):
            self.check(name, 0 <= (getattr(self, name) or 0) <= 1, "in [0, 1]")
        for name in ("temperature", "temperature_stop"):
            value = getattr(self, name)
            self.check(name, value is None or 0 < value < math.inf, "a finite number above 0")
        outside = 0 <= self.label_weight_outside < math.inf
        self.check("label_weight_outside", outside, "a finite number, at least 0")
        self.check("kd_ratio", not self.distils or bool(self.teachers), "0 without --teachers (or name a teacher)")

    @property
    def distils(self) -> bool:
        return max(self.kd_ratio, self.kd_ratio_stop or 0) > 0
