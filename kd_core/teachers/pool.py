"""The teachers of a run: where they come from, how they are frozen and asked, and how their memory is given back."""

import contextlib
import ctypes
import gc
import math
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from kd_core.losses.distillation import Ensemble, mean_teacher_logits
from kd_core.runs.folders import check_folder
from kd_core.system import ranks
from kd_core.system.digests import stored, tensor_digest, weights_digest
from kd_core.teachers.flags import DistillFlags
from kd_core.teachers.placement import PinnedTeachers, teachers_of_rank
from kd_core.teachers.samplers import draw_teachers
from kd_core.teachers.sources import CachedTeacher, source_of
from kd_core.teachers.window import distillation
from kd_core.training import engine


def check_teachers(cfg: DistillFlags, fingerprints: Sequence[Any]) -> None:
    """Raises ValueError when a run is resumed with a teacher that is not what it began with."""
    before = check_folder(cfg).get("teachers", ()) if cfg.resume else ()
    for one, now in zip(before, fingerprints, strict=False):  # none before the first step
        if one.get("fingerprint", now) != now:
            raise ValueError(
                f"--resume: --teachers {one['name']} is not what the run began with; restore it, or start a new run"
            )


def require_finite(teacher: str, score: dict[str, float]) -> None:
    """Raises ValueError naming `teacher` when its evaluation is not numbers."""
    if not all(map(math.isfinite, score.values())):
        shown = " ".join(f"{name} {value}" for name, value in score.items())
        raise ValueError(f"{teacher} answers with no finite numbers ({shown}); check its weights, or choose another")


def held_by(cfg: DistillFlags, rank: int) -> Sequence[int]:
    """Indices of the teachers that `rank` holds: all, unless --teacher-placement is sharded."""
    if cfg.teacher_placement == "sharded":
        return teachers_of_rank(len(cfg.teachers), rank, ranks.world_size())
    return range(len(cfg.teachers))


def build_pool(cfg: DistillFlags, load: Callable[[str], nn.Module], *, columns: int | None = None) -> "TeacherPool":
    """The teachers of `--teachers`, placed as `--teacher-placement` says; a source that is named twice is loaded once.

    Args:
        load: makes a model of one of `--teachers`, on the CPU.

    Raises:
        ValueError: what `load` refuses, a placement that does not fit, or a resumed run's teacher that has changed.
    """
    device, placement = ranks.device(), cfg.teacher_placement
    for flag, chosen in (("--teacher-placement host", placement == "host"), ("--teacher-ahead", cfg.teacher_ahead)):
        if chosen and device.type == "cpu" and ranks.rank() == 0:
            print(f"{flag} has no effect without a GPU", file=sys.stderr, flush=True)
    held = held_by(cfg, ranks.rank())
    named = {source_of(path): path for path in cfg.teachers}
    models = {source: load(path).eval().requires_grad_(False) for source, path in named.items()}
    known = {source: _fingerprint(model) for source, model in models.items()}
    fingerprints = [known[source_of(path)] for path in cfg.teachers]
    check_teachers(cfg, fingerprints)
    pinned = None
    if placement == "host" and device.type == "cuda":
        pinned = PinnedTeachers(list(models.values()), device)
    elif placement == "zero3":
        models = {
            source: engine.split_by_zero3(model, cfg.teacher_deepspeed_config) for source, model in models.items()
        }
    else:
        for index in held:
            models[source_of(cfg.teachers[index])].to(device)
    return TeacherPool(
        cfg.teachers,
        [models[source_of(path)] for path in cfg.teachers],
        fingerprints=fingerprints,
        columns=columns,
        compiled=getattr(cfg, "compile", False),
        ensemble=cfg.ensemble,
        weights=cfg.teacher_weights,
        held=held,
        pinned=pinned,
        split=placement == "zero3",
        ahead=cfg.teacher_ahead and device.type == "cuda",
    )


class MicroBatch(Protocol):
    """What one forward takes: `inputs` of a model, and `keys` of its samples, by which cached answers are found."""

    @property
    def inputs(self) -> tuple[Tensor, ...]: ...

    @property
    def keys(self) -> tuple[Tensor, ...]: ...

    def to(self, device: torch.device) -> Self: ...


Micro = TypeVar("Micro", bound=MicroBatch)


class TeacherPool:
    """Frozen teachers, never in an optimizer or a checkpoint, and released when the window closes.

    Args:
        names: what the log calls them.
        models: modules in the same order, frozen and set to evaluation here; none: they are released already.
        fingerprints: of what the models were loaded from, for run.json.
        columns: V, the columns of their logits that mean something; None for all.
        compiled: whether their forwards go through torch.compile.
        ensemble: what is averaged when several answer.
        weights: one a teacher, of the samplers `weighted` and `curriculum`; none: `weigh` sets them.
        held: indices of the teachers that this rank keeps; None for all.
        pinned: where the weights are when they visit the GPU only to answer.
        split: whether the models are engines of ZeRO-3.
        ahead: whether teachers run one micro-batch ahead of the student, on a side stream of the GPU.
    """

    def __init__(
        self,
        names: Sequence[str],
        models: Sequence[nn.Module],
        *,
        fingerprints: Sequence[Any] = (),
        columns: int | None = None,
        compiled: bool = False,
        ensemble: Ensemble = "probabilities",
        weights: Sequence[float] = (),
        held: Sequence[int] | None = None,
        pinned: PinnedTeachers | None = None,
        split: bool = False,
        ahead: bool = False,
    ) -> None:
        self.names, self.columns, self.ensemble, self.weights = tuple(names), columns, ensemble, tuple(weights)
        self.models, self.fingerprints = dict(enumerate(models)), fingerprints or [None] * len(models)
        self._held = range(len(models)) if held is None else held
        self._pinned, self._split = pinned, split
        self._stream = torch.cuda.Stream() if ahead else None
        for model in models:
            model.eval()  # of an engine returns None
            model.requires_grad_(False)
        self._digests = {model: tensor_digest(model.named_buffers()) for model in models}
        for model in self._digests if compiled else ():
            model.compile()

    def __len__(self) -> int:
        return len(self.models)

    def scores(self, evaluate: Callable[[Any], dict[str, float]]) -> list[dict[str, float]]:
        """`evaluate` of each teacher, of a cached one what its cache recorded; call on every rank, before `keep_held`."""
        scores: dict[nn.Module, dict[str, float]] = {}
        held = [self.models[index] for index in self._held]
        for model in self._digests:
            if isinstance(model, CachedTeacher):
                scores[model] = model.score
                continue
            if model not in held:  # it visits
                model.to(ranks.device())
            with self._on_device(model):
                scores[model] = evaluate(model)
            if model not in held:
                model.cpu()
        self.check_unchanged()
        return [scores[model] for model in self.models.values()]

    def keep_held(self) -> None:
        """Lets go of the teachers that only other ranks hold."""
        self.models = {index: self.models[index] for index in self._held}
        self._digests = {model: self._digests[model] for model in self.models.values()}

    def weigh(self, losses: Sequence[float]) -> None:
        """Sets the weights, unless they were given, to 1 / perplexity, which is exp(-loss); only their ratios matter.

        None is 0: several draws need as many weights above it.
        """
        self.weights = self.weights or tuple(math.exp(max(min(losses) - loss, -100.0)) for loss in losses)

    def device_bytes(self) -> list[int]:
        """Bytes of each teacher's weights on this rank's device at this moment, 0 for those held elsewhere."""
        sizes = [0] * len(self.names)
        for index, model in self.models.items():
            for tensor in (*model.parameters(), *model.buffers()):
                here = getattr(tensor, "ds_tensor", tensor)  # this rank's share under ZeRO-3
                if here.device.type == ranks.device().type:
                    sizes[index] += sum(part.nbytes for part in stored(here))
        return sizes

    def draw(self, cfg: DistillFlags, step: int, rank: int | None = None) -> tuple[int, ...]:
        """Indices of the teachers that answer `rank`, by default this one, at `step`; none outside the window."""
        now, rank = distillation(cfg, step), ranks.rank() if rank is None else rank
        if not now.kd_ratio:
            return ()
        held = held_by(cfg, rank)
        drawn = draw_teachers(
            cfg.sampler, len(held), seed=cfg.seed, step=step, draws=cfg.draws, weights=self.weights, turn=now.turn,
            turns=now.turns, rank=rank,
        )  # fmt: skip
        return tuple(held[index] for index in drawn)

    def drawn_names(self, cfg: DistillFlags, step: int) -> list[str]:
        """Names of the teachers that answer at `step`; of `per_rank`, those of all ranks, in their order."""
        asked = range(ranks.world_size()) if cfg.sampler == "per_rank" else [ranks.rank()]
        return [self.names[index] for rank in asked for index in self.draw(cfg, step, rank)]

    def answers(
        self, cfg: DistillFlags, step: int, micro_batches: Sequence[Micro], clock: Any
    ) -> Iterator[tuple[Micro, Callable[[], Tensor | None]]]:
        """Each micro-batch of a step on the device, with a function that gives the drawn teachers' logits for it.

        The function gives None when no teacher is drawn. Call it as late as possible: teachers that run ahead have
        until then.
        """
        drawn, temperature = self.draw(cfg, step), distillation(cfg, step).temperature
        upcoming = self.draw(cfg, step + cfg.kd_every) if self._pinned else ()
        asked: deque[tuple[Micro, Callable[[], Tensor | None]]] = deque()
        for number, micro in enumerate(micro_batches, 1):
            last = number == len(micro_batches) or len(drawn) == 1
            with clock.part("data"):
                moved = micro.to(ranks.device())
            asked.append((moved, self._ask(moved, drawn, temperature, clock, upcoming if last else drawn)))
            if len(asked) > (self._stream is not None):
                yield asked.popleft()
        yield from asked

    def _ask(
        self, micro: MicroBatch, drawn: Sequence[int], temperature: float, clock: Any, upcoming: Sequence[int]
    ) -> Callable[[], Tensor | None]:
        if not drawn:
            return lambda: None
        if self._stream is None:
            logits = self.logits(drawn, micro.inputs, temperature, keys=micro.keys, clock=clock, upcoming=upcoming)
            return lambda: logits
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            logits = self.logits(drawn, micro.inputs, temperature, keys=micro.keys, clock=clock, upcoming=upcoming)
        done = self._stream.record_event()

        def receive() -> Tensor:
            torch.cuda.current_stream().wait_event(done)
            logits.record_stream(torch.cuda.current_stream())
            return logits

        return receive

    @torch.no_grad()
    def logits(
        self,
        drawn: Sequence[int],
        inputs: tuple[Tensor, ...],
        temperature: float,
        *,
        keys: tuple[Tensor, ...] = (),
        clock: Any = None,
        upcoming: Sequence[int] = (),
    ) -> Tensor:
        """[N, V] logits of the drawn teachers, their ensemble at `temperature` when several.

        Args:
            inputs: of the models.
            keys: of the samples, for cached teachers.
            clock: a `report.Stopwatch` that counts the parts teacher and teacher/<index>.
            upcoming: the draw after this one, whose weights can be fetched meanwhile.
        """
        answers = []
        for index, following in zip(drawn, (*drawn[1:], *upcoming[:1], None), strict=False):
            model = self.models[index]
            with contextlib.ExitStack() as stack:
                if clock is not None:
                    stack.enter_context(clock.part("teacher"))
                    stack.enter_context(clock.part(f"teacher/{index}"))
                stack.enter_context(self._on_device(model))
                if self._pinned is not None and following is not None:
                    self._pinned.prefetch(self.models[following])
                cached = isinstance(model, CachedTeacher)
                answers.append((model(*keys, temperature) if cached else model(*inputs))[:, : self.columns])
        return mean_teacher_logits(answers, temperature, self.ensemble)

    def _on_device(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        return self._pinned.on_device(model) if self._pinned else contextlib.nullcontext()

    def check_unchanged(self) -> None:
        """
        Raises:
            RuntimeError: a teacher's buffers are not what they were: its forward learns although it is in evaluation.
        """
        for index, model in self.models.items():
            if tensor_digest(model.named_buffers()) != self._digests[model]:
                raise RuntimeError(f"teacher {self.names[index]} has changed its buffers in the run; do not use it")

    def release(self) -> None:
        """Gives the teachers' memory back to the device and, on a CPU, to the operating system."""
        self.check_unchanged()
        if self._split:
            engine.destroy_engines(self._digests)
        self.models, self._digests, self._pinned = {}, {}, None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        elif sys.platform == "linux":
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc keeps freed memory otherwise
            if trim is not None:
                trim(0)


def _fingerprint(model: nn.Module) -> Any:
    """What a teacher's answers follow from: of a cache its settings, else a digest of the weights."""
    return model.fingerprint if isinstance(model, CachedTeacher) else weights_digest(model)
