"""The teachers of a run: gathered, judged, asked step by step, and let go when the window closes.

teachers = gather(run, load, evaluate, columns=V, chance_loss=math.log(V))
for step in run.steps(batches, ...):
    for micro, answer in teachers.answers(step, temperature=now.temperature):
        student_logits = student(*micro.inputs)
        teacher_logits = answer()                    # None where no teacher is asked
"""

import contextlib
import gc
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from kd_core.losses.distillation import mean_teacher_logits
from kd_core.runs.folders import check_deepspeed, check_folder
from kd_core.system import memory
from kd_core.system.clock import Stopwatch
from kd_core.system.digests import stored, tensor_digest, weights_digest
from kd_core.system.ranks import device, rank, total, world_size
from kd_core.teachers.flags import DistillFlags, TeacherFlags
from kd_core.teachers.placement import PinnedTeachers, held_by, place
from kd_core.teachers.samplers import draw_teachers
from kd_core.teachers.sources import CachedTeacher, source_of
from kd_core.teachers.window import closed, mix, turn
from kd_core.training.ds_config import read_config
from kd_core.training.engine import destroy_engines
from kd_core.training.loop import Run, Step

Evaluate = Callable[[Any], dict[str, float]]
Ask = Callable[[Any, Any], Any]


class MicroBatch(Protocol):
    """What one forward takes: `inputs` of a model, and `keys` of its samples, by which cached answers are found."""

    @property
    def inputs(self) -> tuple[Tensor, ...]: ...

    @property
    def keys(self) -> tuple[Tensor, ...]: ...

    def to(self, device: torch.device) -> Self: ...


def gather(
    run: Run[Any],
    load: Callable[[str], nn.Module],
    evaluate: Evaluate | None = None,
    *,
    columns: int | None = None,
    chance_loss: float = math.inf,
    ask: Ask | None = None,
    describe: Callable[[Any], Mapping[str, Any]] | None = None,
) -> "TeacherPool":
    """The teachers of `--teachers`, each evaluated once so that a broken one shows here; none behind the window.

    Args:
        load: makes a model of one of `--teachers`, on the CPU; a source that is named twice is loaded once.
        evaluate: metrics of a teacher; None where there are none, as of a teacher that is asked for more than logits.
        columns: V, the columns of their logits that mean something; None for all.
        chance_loss: `eval/loss` of a guess; a teacher above it is warned of.
        ask: what a teacher is asked for in place of logits, from the model and a micro-batch on the device: hidden states,
            attention, a head's input. One teacher a step then, no caches, which hold logits, and no torch.compile of teachers.
        describe: facts of a model that the recipe builds by, such as a width; they stand in `TeacherPool.known`, behind the
            closed window too, when no model is loaded any more.

    Raises:
        ValueError: what `load` refuses, a placement that does not fit, a score that is not finite, a resumed run's teacher
            that has changed, or an ensemble or a cache where `ask` needs one model's inside.
    """
    cfg: TeacherFlags = run.cfg
    if ask is not None:
        alone = cfg.sampler != "all" and cfg.draws == 1
        cfg.check("sampler", alone or not cfg.distils, "one that draws one teacher a step, whose inside is asked for")
        cfg.check("teachers", not (cfg.cached and cfg.distils), "models, as caches hold only their logits")
        whole = cfg.teacher_placement != "zero3" or not cfg.distils
        cfg.check("teacher_placement", whole, "another than zero3, which splits the model whose inside is asked for")
    if cfg.teachers and not cfg.distils:
        run.say("--teachers are not used: --kd-ratio is 0")
    if closed(cfg, run.complete):
        if cfg.resume and run.recall("config")["teachers"] != list(cfg.teachers):
            raise ValueError("--resume: the window has closed, the teachers are asked no more; leave --teachers out")
        released = TeacherPool(cfg, columns=columns, known=run.recall("teachers", []))
        run.at_end(lambda: tell_costs(run, released))
        return released
    named = {source_of(path): path for path in cfg.teachers}
    models = {source: load(path).eval().requires_grad_(False) for source, path in named.items()}
    facts = {source: {"fingerprint": fingerprint(model)} for source, model in models.items()}
    check_unchanged(cfg, [facts[source_of(path)]["fingerprint"] for path in cfg.teachers])
    for source, model in models.items() if describe else ():
        facts[source] |= describe(model) if describe else {}
    if cfg.teacher_placement == "zero3":
        content = read_config(cfg.teacher_deepspeed_config, "--teacher-deepspeed-config")
        check_deepspeed(cfg, "teacher_deepspeed_config", content)
        run.update(teacher_deepspeed=content)
    models, pinned = place(cfg, models)
    pool = TeacherPool(
        cfg, [models[source_of(path)] for path in cfg.teachers], columns=columns, ask=ask, pinned=pinned,
        clock=run.clock, say=run.say,
    )  # fmt: skip
    known = run.recall("teachers", []) if run.first else pool.judge(evaluate, chance_loss)
    pool.weights = cfg.teacher_weights or one_over_perplexity([one.get("eval/loss", 0.0) for one in known])
    pool.keep_held()
    sizes = (total(torch.tensor(pool.device_bytes())) / world_size()).tolist()
    rows = zip(known, cfg.teachers, sizes, strict=True)
    pool.known = [
        one | {"name": path} | facts[source_of(path)] | {"device_bytes": int(size)} for one, path, size in rows
    ]
    run.update(teachers=pool.known)
    run.before_step(pool.release_if_closed)
    run.at_end(lambda: tell_costs(run, pool))
    torch.manual_seed(cfg.seed)  # so that what the recipe builds next does not follow from the teachers
    return pool


def check_unchanged(cfg: TeacherFlags, fingerprints: Sequence[Any]) -> None:
    """Raises ValueError when a run is resumed with a teacher that is not what it began with."""
    before = check_folder(cfg).get("teachers", ()) if cfg.resume else ()
    for one, path, now in zip(before, cfg.teachers, fingerprints, strict=False):  # none before the first step
        if one.get("fingerprint", now) != now:
            raise ValueError(
                f"--resume: --teachers {path} is not what the run began with; restore it, or start a new run"
            )


def fingerprint(model: nn.Module) -> Any:
    """What a teacher's answers follow from: of a cache its settings, else a digest of the weights."""
    return model.fingerprint if isinstance(model, CachedTeacher) else weights_digest(model)


def require_finite(teacher: str, score: Mapping[str, float]) -> None:
    """Raises ValueError naming `teacher` when its evaluation is not numbers."""
    if not all(map(math.isfinite, score.values())):
        shown = " ".join(f"{name} {value}" for name, value in score.items())
        raise ValueError(f"{teacher} answers with no finite numbers ({shown}); check its weights, or choose another")


def one_over_perplexity(losses: Sequence[float]) -> tuple[float, ...]:
    """Weights of which only the ratios matter, none 0: several draws need as many above it. Perplexity is exp(loss)."""
    return tuple(math.exp(max(min(losses) - loss, -100.0)) for loss in losses)


class TeacherPool:
    """Frozen teachers, never in an optimizer or a checkpoint; empty after `release`.

    Args:
        models: one for each of `cfg.teachers`, frozen and set to evaluation here; none: they are released already.
        columns: V, the columns of logits that mean something; None for all.
        ask: what a teacher is asked for in place of logits.
        known: of each teacher its name, score, fingerprint and what `describe` said.
        pinned: where the weights are when they visit the GPU only to answer.
        clock: counts the parts teacher and teacher/<index>.
        say: a line for the reader of the terminal.
    """

    def __init__(
        self,
        cfg: TeacherFlags,
        models: Sequence[nn.Module] = (),
        *,
        columns: int | None = None,
        ask: Ask | None = None,
        known: Sequence[dict[str, Any]] = (),
        pinned: PinnedTeachers | None = None,
        clock: Stopwatch | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.columns, self.known, self.weights = columns, list(known), cfg.teacher_weights
        self._cfg, self._ask, self._pinned, self._say = cfg, ask, pinned, say
        self._clock = clock or Stopwatch({})
        self._stream = torch.cuda.Stream() if models and cfg.teacher_ahead and device().type == "cuda" else None
        for model in models:
            model.eval()  # of an engine returns None
            model.requires_grad_(False)
        self.models = dict(enumerate(models))
        self._digests = {model: tensor_digest(model.named_buffers()) for model in models}
        # A compiled model takes no hooks any more, by which `ask` may look into it.
        for model in self._digests if getattr(cfg, "compile", False) and ask is None else ():
            model.compile()

    def __len__(self) -> int:
        return len(self.models)

    # --- before the first step ----------------------------------------------------------------------------------------

    def judge(self, evaluate: Evaluate | None, chance_loss: float = math.inf) -> list[dict[str, Any]]:
        """Every teacher's name and score, said; of a cached one what its cache recorded. Before `keep_held`, on every rank.

        Raises:
            ValueError: a teacher's score is not finite.
        """
        scores: dict[nn.Module, Mapping[str, float]] = {}
        held = [self.models[index] for index in held_by(self._cfg, rank())]
        for model in self._digests:
            if isinstance(model, CachedTeacher):
                scores[model] = model.score
            elif evaluate is not None:
                if model not in held:  # it visits
                    model.to(device())
                with self._on_device(model):
                    scores[model] = evaluate(model)
                if model not in held:
                    model.cpu()
        self.check_unchanged()
        known = []
        for index, name in enumerate(self._cfg.teachers):
            score = scores.get(self.models[index], {})
            require_finite(f"--teachers {name}", score)
            if score:
                self._say(f"teacher {name} " + " ".join(f"{metric} {value:.4f}" for metric, value in score.items()))
            worse = not score.get("eval/loss", -math.inf) < chance_loss
            if worse:
                self._say(f"warning: teacher {name} is worse than a guess, whose loss is {chance_loss:.4f}")
            known.append({"name": name, **score, "worse_than_chance": worse})
        return known

    def keep_held(self) -> None:
        """Lets go of the teachers that only other ranks hold."""
        self.models = {index: self.models[index] for index in held_by(self._cfg, rank())}
        self._digests = {model: self._digests[model] for model in self.models.values()}

    def device_bytes(self) -> list[int]:
        """Bytes of each teacher's weights on this rank's device at this moment, 0 for those held elsewhere."""
        sizes = [0] * len(self._cfg.teachers)
        for index, model in self.models.items():
            for tensor in (*model.parameters(), *model.buffers()):
                here = getattr(tensor, "ds_tensor", tensor)  # this rank's share under ZeRO-3
                if here.device.type == device().type:
                    sizes[index] += sum(part.nbytes for part in stored(here))
        return sizes

    # --- a step -------------------------------------------------------------------------------------------------------

    def draw(self, step: int, of_rank: int | None = None) -> tuple[int, ...]:
        """Indices of the teachers that answer a rank, by default this one, at `step`; none outside the window."""
        cfg, now, of_rank = self._cfg, turn(self._cfg, step), rank() if of_rank is None else of_rank
        if now is None or (isinstance(cfg, DistillFlags) and not mix(cfg, step).kd_ratio):
            return ()
        held = held_by(cfg, of_rank)
        drawn = draw_teachers(
            cfg.sampler, len(held), seed=cfg.seed, step=step, draws=cfg.draws, weights=self.weights, turn=now.number,
            turns=now.of, rank=of_rank,
        )  # fmt: skip
        return tuple(held[index] for index in drawn)

    def at_hand(self) -> list[nn.Module]:
        """The models whose weights lie whole on this rank's device: none behind the window, none that only visit it."""
        resident = self._cfg.teacher_placement in ("device", "sharded")
        return list(dict.fromkeys(self.models.values())) if resident else []

    def names(self, step: int) -> list[str]:
        """Names of the teachers that answer at `step`; of `per_rank`, those of all ranks, in their order."""
        asked = range(world_size()) if self._cfg.sampler == "per_rank" else [rank()]
        return [self._cfg.teachers[index] for one in asked for index in self.draw(step, one)]

    def answers(
        self, step: Step, micro_batches: Sequence[Any] | None = None, *, temperature: float = 1.0
    ) -> Iterator[tuple[Any, Callable[[], Any]]]:
        """Each micro-batch of the step on the device, with a function that gives what the drawn teachers say of it.

        They say their logits [N, V], or what `ask` is. Call the function as late as possible: teachers that run ahead have
        until then. It gives None where none is drawn.

        Args:
            micro_batches: a `MicroBatch` each; None for the step's own.
            temperature: of the ensemble, when several answer, and of cached answers.
        """
        drawn = self.draw(step.number)
        step.log(teacher=self.names(step.number))
        upcoming = self.draw(step.number + self._cfg.window.every) if self._pinned else ()
        of_step: Sequence[MicroBatch] = step.micro_batches if micro_batches is None else micro_batches
        asked: deque[tuple[Any, Callable[[], Any]]] = deque()
        for number, micro in enumerate(of_step, 1):
            last = number == len(of_step) or len(drawn) == 1
            with self._clock.part("data"):
                moved = micro.to(device())
            asked.append((moved, self._asked(moved, drawn, temperature, upcoming if last else drawn)))
            if len(asked) > (self._stream is not None):
                yield asked.popleft()
        yield from asked

    def _asked(
        self, micro: MicroBatch, drawn: Sequence[int], temperature: float, upcoming: Sequence[int]
    ) -> Callable[[], Any]:
        if not drawn:
            return lambda: None
        if self._stream is None:
            said = self.say(drawn, micro, temperature, upcoming=upcoming)
            return lambda: said
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            said = self.say(drawn, micro, temperature, upcoming=upcoming)
        done = self._stream.record_event()

        def receive() -> Any:
            torch.cuda.current_stream().wait_event(done)
            for leaf in tree_leaves(said):
                if isinstance(leaf, Tensor):
                    leaf.record_stream(torch.cuda.current_stream())
            return said

        return receive

    @torch.no_grad()
    def say(
        self, drawn: Sequence[int], micro: MicroBatch, temperature: float = 1.0, *, upcoming: Sequence[int] = ()
    ) -> Any:
        """[N, V] logits of the drawn teachers, their ensemble at `temperature` when several; or what `ask` gives.

        Args:
            upcoming: the draw after this one, whose weights can be fetched meanwhile.
        """
        answers = []
        for index, following in zip(drawn, (*drawn[1:], *upcoming[:1], None), strict=False):
            model = self.models[index]
            with self._clock.part("teacher"), self._clock.part(f"teacher/{index}"), self._on_device(model):
                if self._pinned is not None and following is not None:
                    self._pinned.prefetch(self.models[following])
                if self._ask is not None:
                    return self._ask(model, micro)
                said = model(*micro.keys, temperature) if isinstance(model, CachedTeacher) else model(*micro.inputs)
                answers.append(said[:, : self.columns])
        return mean_teacher_logits(answers, temperature, self._cfg.ensemble)

    @torch.no_grad()
    def consult(self, micro: MicroBatch) -> Any:
        """As `say` of all teachers at temperature 1, on the device and outside of the teachers' seconds: for what is no step."""
        answers = []
        for model in self.models.values():
            with self._on_device(model):
                if self._ask is not None:
                    return self._ask(model, micro)
                answers.append(model(*micro.inputs)[:, : self.columns])
        return mean_teacher_logits(answers, 1.0, self._cfg.ensemble)

    def _on_device(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        return self._pinned.on_device(model) if self._pinned else contextlib.nullcontext()

    # --- the end ------------------------------------------------------------------------------------------------------

    def check_unchanged(self) -> None:
        """
        Raises:
            RuntimeError: a teacher's buffers are not what they were: its forward learns although it is in evaluation.
        """
        for index, model in self.models.items():
            if tensor_digest(model.named_buffers()) != self._digests[model]:
                raise RuntimeError(
                    f"teacher {self._cfg.teachers[index]} has changed its buffers in the run; do not use it"
                )

    def release_if_closed(self, step: int) -> None:
        """Lets the teachers go once no step from `step` on asks them."""
        if len(self) and closed(self._cfg, step):
            self.release()
            self._say(f"step {step}: the window has closed, the teachers are released")

    def release(self) -> None:
        """Gives the teachers' memory back to the device and, on a CPU, to the operating system."""
        self.check_unchanged()
        if self._cfg.teacher_placement == "zero3":
            destroy_engines(self._digests)
        self.models, self._digests, self._pinned = {}, {}, None
        gc.collect()
        memory.give_back()


def tell_costs(run: Run[Any], pool: TeacherPool) -> None:
    """A line a teacher, over all ranks: how often it was asked, and what that took; also into run.json. Then release."""
    seconds, calls = run.clock.read(wait=True), run.clock.calls
    if "teacher" in calls:
        parts = [f"teacher/{index}" for index in range(len(pool.known))]
        mine = [(calls.get(part, 0), seconds.get(part, 0.0)) for part in parts] + [(1, seconds["train"])]
        *rows, (ranks, train_s) = total(torch.tensor(mine)).tolist()
        costs = [
            one | {"forwards": int(forwards), "seconds": took / ranks, "share": took / train_s if train_s else 0.0}
            for one, (forwards, took) in zip(pool.known, rows, strict=True)
        ]
        run.update(teachers=costs)
        run.say(f"{'forwards':>9} {'seconds':>9} {'of steps':>9} {'MiB':>9}  teacher")
        for one in costs:
            size = one["device_bytes"] / 2**20
            run.say(f"{one['forwards']:9} {one['seconds']:9.1f} {one['share']:9.1%} {size:9.1f}  {one['name']}")
    if len(pool):
        pool.release()
