"""The teachers of a run: where they come from, how they are frozen and asked, and how their memory is given back."""

import contextlib
import ctypes
import gc
import hashlib
import math
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol, Self, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import TorchAoConfig
from transformers.utils import logging

from kd_core.cache import records as cache
from kd_core.cache.records import CachedTeacher
from kd_core.cli import SharedFlags
from kd_core.losses.distillation import Ensemble, mean_teacher_logits
from kd_core.runs import record as report
from kd_core.teachers.placement import PinnedTeachers, teachers_of_rank
from kd_core.teachers.samplers import draw_teachers
from kd_core.training import engine
from kd_core.training.schedules import distillation

# Files that from_pretrained reads without running code: safetensors, or pickles restricted to tensors.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

# What from_pretrained raises for files that are damaged or of something else.
UNLOADABLE = (
    OSError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError, EOFError, UnpicklingError,
    SafetensorError, StrictDataclassError,
)  # fmt: skip


def model_source(path: str, flag: str = "--teachers") -> str:
    """What `from_pretrained` takes for `path`: a run folder's `hf/`, a Hugging Face folder, or a hub name; of a cache, `path`.

    Raises:
        FileNotFoundError: `path` looks like a path and nothing is there.
        ValueError: a folder that is neither a finished run nor a Hugging Face model.
    """
    folder = Path(path)
    if cache.folder_of(path):
        return path
    if folder.is_dir():
        if (folder / "run.json").exists():
            if not (folder / "hf" / "config.json").exists():
                raise ValueError(f"{flag} {path} is a run without hf/: it has not finished; continue it with --resume")
            folder = folder / "hf"
        if not (folder / "config.json").exists() or not any((folder / name).exists() for name in WEIGHT_FILES):
            raise ValueError(f"{flag} {path} is no model: expected a run folder, or config.json with model.safetensors")
        return str(folder.resolve())
    if folder.exists() or path.startswith((".", "/", "~", "runs/")) or path.count("/") > 1:
        raise FileNotFoundError(
            f"{flag} {path}: no model folder there; give a run folder, a model folder or a hub name"
        )
    return path


def load_pretrained(
    model_class: Any, path: str, vocab_size: int, *, flag: str = "--teachers", seq_len: int = 0, **settings: Any
) -> Any:
    """`model_class.from_pretrained`, refusing what would silently be half a model or would run code.

    Args:
        vocab_size: tokens of the run's tokenizer, which the model must know.
        seq_len: positions of the run's samples, which it must have.
        settings: passed on; they become part of the model's config.

    Raises:
        ValueError: another architecture, missing weights, too few tokens or positions, an unreadable or unsafe file.
    """
    source = model_source(path, flag)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what its table of weights says is said below in one line
    try:
        model, info = model_class.from_pretrained(
            source, output_loading_info=True, trust_remote_code=False, ignore_mismatched_sizes=True, **settings
        )
    except UNLOADABLE as error:
        reason = " ".join((str(error) or repr(error)).split())[:200]
        raise ValueError(f"{flag} {path} cannot be loaded: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)
    tied = set(getattr(model, "_tied_weights_keys", None) or {})
    wrong = sorted(set(info["missing_keys"]) - tied) or sorted(name for name, *_ in info["mismatched_keys"])
    if wrong:
        raise ValueError(
            f"{flag} {path} lacks {len(wrong)} weights of {model_class.__name__}, or has them in other shapes: {wrong[0]}"
        )
    if model.config.vocab_size < vocab_size:
        raise ValueError(f"{flag} {path} knows {model.config.vocab_size} tokens, the run's tokenizer has {vocab_size}")
    if model.config.max_position_embeddings < seq_len:
        positions = model.config.max_position_embeddings
        raise ValueError(f"{flag} {path} has {positions} positions, fewer than --seq-len {seq_len}; lower --seq-len")
    return model


def int8_weights(*, keep: Sequence[str]) -> TorchAoConfig:
    """For `load_pretrained`'s `quantization_config`: weights of linear layers in 8 bits, but for the modules `keep`."""
    from torchao.quantization import Int8WeightOnlyConfig  # here, because only int8 teachers need it

    return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=list(keep))


def held_by(cfg: SharedFlags, rank: int) -> Sequence[int]:
    """Indices of the teachers that `rank` holds: all, unless --teacher-placement is sharded."""
    if cfg.teacher_placement == "sharded":
        return teachers_of_rank(len(cfg.teachers), rank, engine.world_size())
    return range(len(cfg.teachers))


def build_pool(cfg: SharedFlags, load: Callable[[str], nn.Module], *, columns: int | None = None) -> "TeacherPool":
    """The teachers of `--teachers`, placed as `--teacher-placement` says; a source that is named twice is loaded once.

    Args:
        load: makes a model of one of `--teachers`, on the CPU.

    Raises:
        ValueError: what `load` refuses, a placement that does not fit, or a resumed run's teacher that has changed.
    """
    device, placement = engine.device(), cfg.teacher_placement
    for flag, chosen in (("--teacher-placement host", placement == "host"), ("--teacher-ahead", cfg.teacher_ahead)):
        if chosen and device.type == "cpu" and engine.rank() == 0:
            print(f"{flag} has no effect without a GPU", file=sys.stderr, flush=True)
    held = held_by(cfg, engine.rank())
    named = {model_source(path): path for path in cfg.teachers}
    models = {source: load(path).eval().requires_grad_(False) for source, path in named.items()}
    known = {source: _fingerprint(model) for source, model in models.items()}
    fingerprints = [known[model_source(path)] for path in cfg.teachers]
    report.check_teachers(cfg, fingerprints)
    pinned = None
    if placement == "host" and device.type == "cuda":
        pinned = PinnedTeachers(list(models.values()), device)
    elif placement == "zero3":
        models = {
            source: engine.split_by_zero3(model, cfg.teacher_deepspeed_config) for source, model in models.items()
        }
    else:
        for index in held:
            models[model_source(cfg.teachers[index])].to(device)
    return TeacherPool(
        cfg.teachers,
        [models[model_source(path)] for path in cfg.teachers],
        fingerprints=fingerprints,
        columns=columns,
        compiled=cfg.compile,
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
                model.to(engine.device())
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
                if here.device.type == engine.device().type:
                    sizes[index] += sum(part.nbytes for part in _stored(here))
        return sizes

    def draw(self, cfg: SharedFlags, step: int, rank: int | None = None) -> tuple[int, ...]:
        """Indices of the teachers that answer `rank`, by default this one, at `step`; none outside the window."""
        now, rank = distillation(cfg, step), engine.rank() if rank is None else rank
        if not now.kd_ratio:
            return ()
        held = held_by(cfg, rank)
        drawn = draw_teachers(
            cfg.sampler, len(held), seed=cfg.seed, step=step, draws=cfg.draws, weights=self.weights, turn=now.turn,
            turns=now.turns, rank=rank,
        )  # fmt: skip
        return tuple(held[index] for index in drawn)

    def drawn_names(self, cfg: SharedFlags, step: int) -> list[str]:
        """Names of the teachers that answer at `step`; of `per_rank`, those of all ranks, in their order."""
        ranks = range(engine.world_size()) if cfg.sampler == "per_rank" else [engine.rank()]
        return [self.names[index] for rank in ranks for index in self.draw(cfg, step, rank)]

    def answers(
        self, cfg: SharedFlags, step: int, micro_batches: Sequence[Micro], clock: Any
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
                moved = micro.to(engine.device())
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


def _stored(tensor: Tensor) -> list[Tensor]:
    """The tensors that a quantised one consists of; another is its own."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in _stored(getattr(tensor, name))]


def _fingerprint(model: nn.Module) -> Any:
    """What a teacher's answers follow from: of a cache its settings, else a digest of the weights."""
    return model.fingerprint if isinstance(model, CachedTeacher) else weights_digest(model)


def weights_digest(model: nn.Module) -> str:
    return tensor_digest(sorted(model.state_dict().items()))


def tensor_digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """Of names and bytes."""
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(name.encode())
        for part in _stored(tensor):
            digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
