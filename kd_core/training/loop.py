"""A run from its command line to its result: all that is the same in every recipe, around a loop that is the recipe's own.

    def main(typed=None, preset=""):
        with start(__file__, Config, typed, preset) as run:     # until the first step, bad input is one line and exit code 2
            data = run.prepare(build_data)                      # local rank 0 first; the run folder; the checkpoint to resume
            student = run.engine(model, optimizer)              # DeepSpeed, restored
            for step in run.steps(batches, evaluate):           # clock, seed, log, evaluation, checkpoint, clean stop
                for micro in step.micro_batches:
                    step.backward(student, loss_sum, label_loss=label_sum)
                step.update(student, lr=...)
            export(...)                                         # reached by a run that went to its end
        return run.code

The generator holds what happens between steps; the body of the loop is the method. There is nothing to subclass, and nothing
is called back but `evaluate`, a plain function of no arguments.
"""

import contextlib
import hashlib
import io
import json
import math
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from kd_core import cli
from kd_core.runs import code, folders, sources
from kd_core.runs.flags import RunFlags
from kd_core.runs.record import Record
from kd_core.system.clock import Stopwatch
from kd_core.system.digests import tensor_digest
from kd_core.system.files import let_go
from kd_core.system.hashing import seed_step
from kd_core.system.memory import peak_gib
from kd_core.system.ranks import broadcast, device, gathered, rank, total, world_size
from kd_core.training import checkpoints
from kd_core.training import engine as engines
from kd_core.training.ds_config import read_config
from kd_core.training.engine import Engine, LoopError, NonFiniteStepError
from kd_core.training.flags import TrainFlags
from kd_core.training.guards import Guards
from kd_core.training.kept import Before
from kd_core.training.plain import PlainEngine
from kd_core.training.processes import check_launcher, join, leave, limit_collectives
from kd_core.training.stop import Interrupted, StopSignal

# Names of the log that no term may have; nor may it end in _s, as seconds do, or begin with eval/.
TAKEN = {"step", "samples", "tokens", "loss", "lr", "grad_norm", "kd_ratio", "teacher", "rows"}


class Stateful(Protocol):
    """What a checkpoint can keep: torch's own protocol, of optimizers, modules, schedulers."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any, /) -> Any: ...


C = TypeVar("C", bound=RunFlags)
D = TypeVar("D")


class Stopped(Exception):
    """The run ends here, without an export: `reason` and `fields` go into its result, `code` is the process's.

    To be raised on all ranks alike, within the loop over `Run.steps`.
    """

    def __init__(self, reason: str, *, code: int = 1, **fields: Any) -> None:
        super().__init__(reason)
        self.reason, self.code, self.fields = reason, code, fields


@contextlib.contextmanager
def start(file: str, config: type[C], typed: Sequence[str] | None = None, preset: str = "") -> Iterator["Run[C]"]:
    """The run that the command line `typed` asks for, over a launch file's flags `preset`.

    Until `Run.steps` begins, what a user can fix ends the process with one line, exit code 2 and nothing left behind.
    A run that `--resume` finds finished ends the process with 0.

    Args:
        file: the recipe's `__file__`, whose stem names the runs.
    """
    with contextlib.ExitStack() as set_up:
        undo = set_up.enter_context(cli.one_line_errors())
        check_launcher()
        cfg = cli.parse(config, typed, preset)
        if folders.says_finished(cfg):
            raise SystemExit(0)
        run = Run(Path(file), cfg, undo, set_up)
        try:
            yield run
            if not run.went_to_its_end:
                raise LoopError("the loop over Run.steps was left before its last step; raise Stopped(reason)")
            run.finish("finished", step=cfg.steps)
        except Stopped as stop:
            if not hasattr(run, "stop"):
                raise LoopError("Stopped before Run.steps has begun; what a user can fix is a ValueError") from stop
            run.finish(stop.reason, code=stop.code, **stop.fields)
        except Interrupted:
            run.give_up_step()
            end = run.stopped(run.number)
            run.finish(end.reason, code=end.code, **end.fields)
        except NonFiniteStepError as error:
            run.finish("non-finite", code=1, step=run.number + 1, error=str(error), sample_ids=list(error.samples))


class Run(Generic[C]):
    """One run of a recipe: where it lies, where it begins, and what of it has to be continued.

    Attributes:
        first: the step to begin with: 0, or that of the checkpoint.
        complete: the steps that nothing is left of: one less where an evaluation is owed.
        position: of the data, as the last batch before the checkpoint called it; None at the beginning.
        code: of the process, once the run has ended.
    """

    cfg: C
    folder: Path
    first: int
    complete: int
    position: Any
    clock: Stopwatch
    code = 0

    def __init__(self, file: Path, cfg: C, undo: contextlib.ExitStack, set_up: contextlib.ExitStack) -> None:
        self.recipe, self._file, self.cfg, self._undo, self._set_up = file.stem, file, cfg, undo, set_up
        self._engines: dict[str, Engine] = {}
        self.after: dict[str, Callable[[nn.Module], Any]] = {}
        self._kept: dict[str, Stateful] = {}
        self._fields: dict[str, Any] = {}  # of run.json: by what a resumed run knows its inputs
        self._before_step: list[Callable[[int], None]] = []
        self._at_end: list[Callable[[], None]] = []
        self.guards = Guards()
        self.number, self.went_to_its_end, self._saved = 0, False, False
        self._before: Before | None = None
        self._line: dict[str, Any] | None = None  # of the last step, if it is not in the log

    # --- set-up -------------------------------------------------------------------------------------------------------

    def prepare(self, build: Callable[[C], D]) -> D:
        """Claims the run folder, calls `build` and joins the ranks; on each node local rank 0 goes first.

        Everything that bad input can make fail belongs into `build`, cheapest first: an error there ends the run before any
        rank has joined and before any model is built. What it returns, or the first of a tuple, may have a `fingerprint`, which
        must not change on resume: equal fingerprints give equal batches.
        """

        def on_each_rank() -> tuple[Path, D]:
            if isinstance(self.cfg, TrainFlags):
                self._ds_config = engines.load_config(self.cfg)
                self._fields["deepspeed"] = read_config(self.cfg.deepspeed_config)
                folders.check_deepspeed(self.cfg, "deepspeed_config", self._fields["deepspeed"])
            folder = folders.claim_folder(self.cfg, self.recipe, self._undo)
            data = build(self.cfg)
            fingerprint: str | None = getattr(data[0] if isinstance(data, tuple) else data, "fingerprint", None)
            if fingerprint is not None:
                folders.check_data(self.cfg, fingerprint)
                self._fields["data"] = fingerprint
            return folder, data

        folder, data = join(on_each_rank)
        self.folder = broadcast(folder)
        self._checkpoints = self.folder / "checkpoints"
        self._checkpoint = checkpoints.newest_checkpoint(self._checkpoints) if self.cfg.resume else None
        self.first = checkpoints.step_of(self._checkpoint)
        self._state: dict[str, Any] = {}
        if self._checkpoint:
            self._state = checkpoints.read_state(self._checkpoints / self._checkpoint)
        self.complete = checkpoints.steps_complete(self._state, self.first)
        self.position = self._position = self._state.get("position")
        clocks = self._state.get("clocks")  # of older runs, seconds alone
        clock = clocks[rank()] if clocks else (self._state.get("seconds", {}),)
        self.clock = Stopwatch(*clock, compiling=getattr(self.cfg, "compile", False))
        self.record = Record(self.folder, self.cfg)
        self._require_own_checkpoint()
        made_by, before = code.digests(self._file), self.record.fields
        self.record.update(**self._fields, code=code.resumed(before, made_by) if self.cfg.resume else made_by)
        self._began = time.monotonic()
        limit_collectives()
        torch.manual_seed(self.cfg.seed)  # of what the recipe builds itself
        return data

    def _require_own_checkpoint(self) -> None:
        self._id, saved = self.recall("id"), self.recall("saved")
        if self._checkpoint and self._state.get("run", self._id) != self._id:
            raise ValueError(
                f"--resume: {self._checkpoints / self._checkpoint} is not of the run that {self.folder / 'run.json'} "
                "describes; restore the one that belongs to the other"
            )
        if self.cfg.resume and not self._checkpoint:
            if saved:
                raise ValueError(
                    f"--resume: the run had saved step {saved}, and {self._checkpoints} holds no checkpoint now; restore "
                    "it, or start a new run in another --out"
                )
            self.say(f"--resume: {self.folder} has no checkpoint yet, so it begins again")

    def engine(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        name: str = "student",
        backwards: int | None = 1,
        after: Callable[[nn.Module], Any] | None = None,
    ) -> Engine:
        """A DeepSpeed engine around `model`, with the weights of the checkpoint when the run is resumed.

        Args:
            name: of its checkpoint's folder and its values in the log; the first engine's have no prefix.
            backwards: backward passes of a micro-batch in an update; None: any number, reduced in `Step.update`.
            after: called with the module after each update, on every rank.
        """
        if getattr(self.cfg, "compile", False):
            model.compile()
        if not isinstance(self.cfg, TrainFlags):
            raise LoopError("Run.engine needs a Config with TrainFlags, whose --deepspeed-config it takes")
        # DeepSpeed's list of optimizers tested with ZeRO has no SGD; the project's tests do.
        config = engines.for_backwards(self._ds_config, backwards) | {"zero_allow_untested_optimizer": True}
        what = f"--deepspeed-config {self.cfg.deepspeed_config}"
        return self._add(name, engines.initialize(model, optimizer, config, what), after)

    def plain_engine(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        name: str = "student",
        after: Callable[[nn.Module], Any] | None = None,
    ) -> PlainEngine:
        """The same without DeepSpeed, for what is no network or needs gradients of gradients."""
        plain = PlainEngine(module.to(device()), optimizer, clip=getattr(self.cfg, "clip", 0.0))
        engine: PlainEngine = self._add(name, plain, after)
        return engine

    def _add(self, name: str, engine: Engine, after: Callable[[nn.Module], Any] | None) -> Engine:
        if name in self._engines:
            raise LoopError(f"two engines are called {name!r}; give one another name")
        self._check_origin(name, engine.module)
        if self._checkpoint:
            checkpoints.load(self._checkpoints, self._checkpoint, engine, name, first=not self._engines)
        self._engines[name] = engine
        if after is not None:
            self.after[name] = after
        self.guards.add(name, engine)
        return engine

    def _check_origin(self, name: str, module: nn.Module) -> None:
        """Refuses to resume with another folder than the one that the network began with, wherever that lies now."""
        found = [getattr(part, "read_from", None) for part in module.modules()]
        source = next(filter(None, found), None)
        before = self.recall("models", {})
        now = broadcast(sources.fingerprint(source) if rank() == 0 and source else None)
        if self.cfg.resume and before.get(name, now) != now:
            path = getattr(self.cfg, name, source)
            raise ValueError(
                f"--resume: --{name} {path} is not what the run began with; restore it, or start a new run"
            )
        if now:
            self.update(models=before | {name: now})

    def name_of(self, engine: Engine) -> str:
        """The name that `engine` was given."""
        found = [name for name, one in self._engines.items() if one is engine]
        if not found:
            raise LoopError("an engine that is none of the run's; make it by Run.engine or Run.plain_engine")
        return found[0]

    def prefix(self, engine: Engine) -> str:
        """Of an engine's values in the log: none for the first engine's."""
        name = self.name_of(engine)
        return "" if name == next(iter(self._engines)) else f"{name}_"

    def keep(self, **stateful: Stateful) -> None:
        """Has checkpoints keep these, under their names, and restores them when the run is resumed.

        Their state must be equal on all ranks and consist of tensors, numbers, strings and containers of them.

        Raises:
            ValueError: the checkpoint to resume has nothing of a name.
        """
        for name, one in stateful.items():
            if self._checkpoint:
                kept = self._state.get("kept", self._state)  # older checkpoints have it beside the rest
                if name not in kept:
                    raise ValueError(
                        f"--resume: {self._checkpoints / self._checkpoint} has nothing of {name!r}, which this recipe keeps; "
                        "resume with the recipe that wrote it, or start a new run in another --out"
                    )
                one.load_state_dict(kept[name])
            self._kept[name] = one

    def say(self, text: str) -> None:
        """A line for the reader of the terminal."""
        self.record.say(text)

    def update(self, **fields: Any) -> None:
        """Sets fields of run.json."""
        self.record.update(**fields)

    def recall(self, field: str, default: Any = None) -> Any:
        """A field of run.json, as rank 0 has it; call on every rank."""
        return broadcast(self.record.fields.get(field, default))

    def before_step(self, function: Callable[[int], None]) -> None:
        """Has `function` called with the number of each step before it begins, outside of the training's seconds."""
        self._before_step.append(function)

    def at_end(self, function: Callable[[], None]) -> None:
        """Has `function` called once, after the last step or when the run stops, on every rank."""
        self._at_end.append(function)

    # --- training -----------------------------------------------------------------------------------------------------

    def steps(
        self, batches: Iterable[Any] | None = None, evaluate: Callable[[], Mapping[str, float]] | None = None
    ) -> Iterator["Step"]:
        """The optimizer steps from `first` to the last; between them the log, evaluations, checkpoints and clean stops.

        Args:
            batches: one a step, from `first` and `position` on; None for methods without data. A batch has what it has of
                `micro_batches`, of `rows` (supervised rows of this rank, which its losses are summed over) or `total_rows` (of
                all ranks, where they are known), of `counts` (sums for the log, by name), of `check` (called with the step after
                it, to raise Stopped) and of `position` (where the data stands after it; None where the step says it).
                Without micro-batches there is one row a rank.
            evaluate: metrics "eval/..." over all ranks; the time that it takes is not the training's.

        A step that takes long is given up in favour of the last one, and an evaluation until the run is resumed.

        Raises:
            Stopped: a signal or --max-minutes, once the checkpoint is written; the `with` of `start` takes it.
        """
        cfg, ahead = self.cfg, None if batches is None else iter(batches)
        owed = json.loads(self._state.get("owed") or "null")  # the line of a step that was not evaluated any more
        self.record.begin(cfg, self.complete, self.first, self._state.get("log"))
        self._state = {}
        self._set_up.close()  # what is wrong from here on is no user's flag
        self.stop = StopSignal(cfg.max_minutes, self._began, cfg.grace_seconds)
        self.stop.taken = self.stop.saved = self.number = self.first
        if owed and evaluate:
            evaluated = self._evaluate(owed, evaluate)
            self._write(owed, write=True)
            if not evaluated:
                raise self.stopped(self.first)
        for number in range(self.first, cfg.steps):
            self.number, last = number, number + 1 == cfg.steps
            for function in self._before_step:
                function(number)
            with self.clock.part("train"):
                with self.clock.part("data", on_host=True):
                    batch = None if ahead is None else next(ahead, None)
                if ahead is not None and batch is None:
                    raise LoopError(f"the batches ended before step {number + 1} of {cfg.steps}")
                for engine in self._engines.values():
                    engine.train()
                seed_step(cfg.seed, number)
                step = Step(self, number, batch)
                self._before = Before(self._engines.values(), self._kept) if self.stop.pace.looks_within else None
                self.stop.pace.begin()
                yield step
                step.close()
            self.stop.taken = number + 1
            if check := getattr(batch, "check", None):
                check(step)
            due = evaluate if last or (number + 1) % cfg.eval_every == 0 else None
            if due and (last or not self.stop.agreed) and self._evaluate(step.line, due):
                due = None
            logged = last or bool(self.stop.agreed) or (number + 1) % cfg.log_every == 0
            self._write(step.line, write=logged)
            self._line, self._position = None if logged else step.line, getattr(batch, "position", None)
            if last or self.stop.agreed or (number + 1) % cfg.save_every == 0:
                self._save(number + 1, owed=step.line if due else None)
            if self.stop.agreed and (due or not last):
                raise self.stopped(number + 1)
        self._end()
        self.went_to_its_end = True

    def _end(self) -> None:
        functions, self._at_end = self._at_end, []
        for function in functions:
            function()

    def stopped(self, step: int) -> Stopped:
        """What ends the run after `step` steps, for the reason that all ranks have agreed on."""
        return Stopped(self.stop.agreed, code=130 if self.stop.agreed == "SIGINT" else 0, step=step)

    def can_give_up_step(self) -> bool:
        """Whether the run can go back to where the step began."""
        return self._before is not None and self._before.restore()

    def give_up_step(self) -> None:
        """Saves what the last step has left, when a step was interrupted."""
        if self._line:
            self._write(self._line, write=True)
        if self.number > self.stop.saved:
            self._save(self.number)

    def _evaluate(self, line: dict[str, Any], evaluate: Callable[[], Mapping[str, float]]) -> bool:
        """Adds the evaluation to the line of a step; False when it was interrupted."""
        try:
            line |= evaluate()
        except Interrupted:
            return False
        return True

    def _write(self, line: dict[str, Any], *, write: bool) -> None:
        evaluated = any(name.startswith("eval/") for name in line)
        seconds = self.clock.read(wait=evaluated)  # on every rank: it frees what has been read
        values = line | {f"{part}_s": round(value, 6) for part, value in seconds.items() if "/" not in part}
        self.record.line(values, write=write)

    def _save(self, step: int, owed: dict[str, Any] | None = None) -> None:
        if self.record.writer:
            folders.hold_folder(self.folder)  # whose lock somebody may have removed
        for name, engine in self._engines.items() if world_size() > 1 else ():
            if len(set(gathered(tensor_digest(engine.module.named_buffers())))) > 1:
                raise LoopError(
                    f"ranks have other buffers of {name!r}, such as running statistics; average them after each update by "
                    "Run.engine(..., after=), as images.resnets.average_batch_norm does"
                )
        state: dict[str, Any] = {
            "position": None if self._position is None else tuple(self._position),
            "clocks": gathered((self.clock.read(wait=True), self.clock.calls)),
            "kept": {name: one.state_dict() for name, one in self._kept.items()},
            "owed": owed and json.dumps(owed),
            "run": self._id,
            "log": self.record.mark(),
        }
        if not self._saved:  # what would not come back is found at the first checkpoint, not at the resume
            for name, kept in state["kept"].items():
                _require_loadable(name, kept)
        self._saved = True
        checkpoints.save(self._checkpoints, step, self._engines, state, self.cfg.keep)
        self.stop.saved = step
        self.record.update(saved=step)

    def finish(self, stopped: str, *, code: int = 0, **fields: Any) -> None:
        """Writes the result and leaves the process group; `start` calls it."""
        self._end()
        self.record.finish(stopped, peak_memory_gib=peak_gib(), **fields)
        leave()
        StopSignal.current = None
        let_go(folders.lock_of(self.folder))
        self.code = code


class Step:
    """One optimizer step: its batch, and what of its losses is summed over micro-batches and ranks.

    Attributes:
        number: counted from 0.
        line: the step's values for the log.
    """

    def __init__(self, run: Run[Any], number: int, batch: Any) -> None:
        self._run, self.number, self.batch = run, number, batch
        self.micro_batches: Sequence[Any] = getattr(batch, "micro_batches", ())
        self._rows: Tensor | None = None
        if (everywhere := getattr(batch, "total_rows", None)) is not None:
            self._rows = torch.full((), float(everywhere), device=device())
        elif (own := getattr(batch, "rows", None)) is not None:
            self._rows = total(own)
        elif not self.micro_batches:
            self._rows = torch.full((), float(world_size()), device=device())
        self.line: dict[str, Any] = {"step": number + 1}
        if isinstance(run.cfg, TrainFlags):
            self.line["samples"] = (number + 1) * run.cfg.global_batch_size
        self._losses: dict[str, list[Tensor]] = {}  # by engine
        self._terms: dict[str, dict[str, list[Tensor]]] = {}  # by engine; divided by rows for the log
        self._counts: dict[str, list[Tensor]] = {}  # not divided
        self.count(**getattr(batch, "counts", {}))
        self._random: torch.Generator | None = None
        self._agreed = False

    @property
    def rows(self) -> Tensor:
        """Scalar, supervised rows over all ranks: what sums are divided by."""
        if self._rows is None:
            raise LoopError("the batch has micro-batches and no rows; say how many there are by Step.supervise")
        return self._rows

    @rows.setter
    def rows(self, _: Any) -> None:
        raise LoopError("Step.rows cannot be set; Step.supervise takes the rows of this rank and sums them over ranks")

    def supervise(self, rows: Tensor | float) -> None:
        """Says how many rows this rank's losses are summed over, where the recipe makes its own samples.

        Args:
            rows: of all micro-batches of the update together, of this rank alone; call on every rank.
        """
        if self._losses:
            raise LoopError("Step.supervise comes before the first Step.backward of an update")
        self._rows = total(rows)

    @property
    def random(self) -> torch.Generator:
        """A generator on the CPU that is a function of (seed, step), equal on all ranks; torch's own differs by rank."""
        if self._random is None:
            mixed = hashlib.blake2b(f"{self._run.cfg.seed},{self.number}".encode(), digest_size=7).digest()
            self._random = torch.Generator().manual_seed(int.from_bytes(mixed, "little"))
        return self._random

    def part(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Counts the seconds of the block, within those of training, as `<name>_s` in the log."""
        return self._run.clock.part(name)

    def backward(self, engine: Engine, loss_sum: Tensor, **terms: Tensor) -> None:
        """Adds the gradient of `loss_sum / rows` to the engine's.

        Args:
            loss_sum: scalar, summed over the supervised rows of a micro-batch.
            terms: scalars for the log, parts of it, summed likewise, before weights; the same names on every rank.

        Raises:
            LoopError: a loss that is no scalar or not the engine's own, a name that the log has for something else.
        """
        name = self._run.name_of(engine)
        _refuse(terms)
        for what, value in {"the loss": loss_sum, **terms}.items():
            if not isinstance(value, Tensor) or value.ndim:
                got = f"the shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
                raise LoopError(f"{what} is a sum over rows, a tensor without dimensions; got {got}")
        with self._run.guards.backward(name):
            engines.backward(engine, loss_sum, self.rows)
        self._losses.setdefault(name, []).append(loss_sum.detach())
        for term, value in terms.items():
            self._terms.setdefault(name, {}).setdefault(term, []).append(value.detach())
        counted = engines.due_backwards(engine) is not None  # as often on every rank
        if counted and not self._agreed and self._run.stop.look() and self._run.can_give_up_step():
            raise Interrupted

    def count(self, **values: Tensor | float) -> None:
        """Adds to sums over ranks for the log, which are not divided by rows; they go with the next update."""
        _refuse(values)
        for name, value in values.items():
            if not isinstance(value, Tensor):
                value = torch.full((), float(value), device=device())  # filled there: a copy would wait for the GPU
            self._counts.setdefault(name, []).append(value.detach().to(device()))

    def update(self, engine: Engine, *, lr: float) -> dict[str, float]:
        """Takes the engine's optimizer step. Returns its loss and the terms since its last update, means over all ranks, the
        counts, and the `rows` that were supervised. Without any, gradient and rate are 0: no weight moves.

        Raises:
            LoopError: a number of backward passes that the engine does not count on, terms that ranks do not share, a loss
                without rows.
            NonFiniteStepError: the loss or the gradient is not finite. In none of these cases anything has moved.
        """
        name = self._run.name_of(engine)
        if name not in self._losses:
            raise LoopError(f"Step.update of the engine {name!r} without a Step.backward since its last update")
        losses, terms = self._losses.pop(name), self._terms.pop(name, {})
        counts, self._counts = self._counts, {}
        engines.check_backwards(engine, len(losses))
        if both := sorted(terms.keys() & counts.keys()):
            raise LoopError(f"{both[0]!r} is a term and a count; call one by another name")
        sums = {"loss": losses, **terms, **counts}
        # The one place of an update where the host waits for the GPU. Votes to stop travel along, and what says that ranks
        # sum the same things.
        stop = self._run.stop
        names = zlib.crc32(",".join([name, *sums]).encode()) % 2**12
        touched = zlib.crc32(self._run.guards.used(name)) % 2**12
        agree = [torch.full((1,), float(value), device=device()) for value in (names, touched)]
        own_votes = stop.votes()
        mine = torch.cat([own_votes, *agree, _summed(sums.values())])
        mine = nn.functional.pad(mine, (0, -len(mine) % 64))  # or ranks with other terms would wait for each other
        *read, rows = torch.cat([total(mine), self.rows[None]]).tolist()
        votes, (all_names, all_touched, *read) = read[: len(own_votes)], read[len(own_votes) :]
        if all_names != names * world_size():
            own = ", ".join(sums)
            raise LoopError(
                f"ranks have other terms than this one's of {name!r}: {own}; give all the same names, in order"
            )
        if all_touched != touched * world_size():
            raise LoopError(
                f"other parameters of {name!r} have a gradient on this rank than elsewhere, so reductions would mix them up; "
                "use the same ones on every rank, or take Run.plain_engine"
            )
        values = {term: one if term in counts else one / max(rows, 1) for term, one in zip(sums, read, strict=False)}
        if not rows:
            if values["loss"]:
                raise LoopError(f"a loss of {values['loss']} in a step whose ranks have no supervised row")
            self._run.say(f"step {self.number + 1} has no supervised row on any rank, so it leaves the weights alone")
            lr = 0.0
        stop.count(votes)
        self._agreed = True
        try:
            if not math.isfinite(values["loss"]):
                raise NonFiniteStepError(f"the loss is {values['loss']}")
            values |= {"lr": lr, "grad_norm": engines.update(engine, lr)}
        except NonFiniteStepError as error:
            raise engines.blame(error, self.micro_batches, losses) from None
        self._run.guards.updated(name)
        if after := self._run.after.get(name):
            after(engine.module)
        prefix = self._run.prefix(engine)
        self.line |= {term if term in counts else prefix + term: value for term, value in values.items()}
        return values | {"rows": rows}

    def log(self, **values: Any) -> None:
        """Adds values to the step's line."""
        self.line |= values

    def close(self) -> None:
        """After the recipe's part: a step without update agrees on stopping by itself."""
        if self._losses:
            raise LoopError(f"a step ended after Step.backward without Step.update of {', '.join(self._losses)}")
        if not self._agreed:
            self._run.stop.count(total(self._run.stop.votes()).tolist())


def _require_loadable(name: str, kept: Any) -> None:
    file = io.BytesIO()
    torch.save(kept, file)
    try:
        torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    except UnpicklingError:
        raise LoopError(
            f"the state of {name!r} could not be loaded again; it may hold tensors, numbers, strings and containers of them"
        ) from None


def _refuse(names: Mapping[str, Any]) -> None:
    taken = sorted(name for name in names if name in TAKEN or name.endswith("_s") or name.startswith("eval/"))
    if taken:
        raise LoopError(f"the log has {taken[0]!r} for something else; call the term by another name")


def _summed(sums: Iterable[Sequence[Tensor]]) -> Tensor:
    """float32 [terms]: each one's sum over its micro-batches, added in their order."""
    columns = list(sums)
    longest = max(map(len, columns))
    zero = torch.zeros((), device=device())
    padded = [
        torch.stack([*(value.float() for value in column), *[zero] * (longest - len(column))]) for column in columns
    ]
    return torch.stack(padded, 1).sum(0)
