"""Teachers are frozen, answer without gradients, and give their memory back."""

import contextlib
import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM
from transformers.utils import logging

from kd_core.cache import logits as cache_logits
from kd_core.runs.record import Record
from kd_core.runs.sources import model_source
from kd_core.system.clock import Stopwatch
from kd_core.teachers import pool as pool_module
from kd_core.teachers.flags import DistillFlags
from kd_core.teachers.placement import PinnedTeachers, teachers_of_rank
from kd_core.teachers.pool import TeacherPool, check_unchanged, fingerprint, gather, one_over_perplexity
from kd_core.teachers.sources import CachedTeacher
from kd_core.teachers.window import still_needed
from kd_core.text.pretrained import load_pretrained


def flags(**changed: Any) -> DistillFlags:
    return DistillFlags(**{"teachers": ("a", "b", "c", "d"), "kd_ratio": 0.5, "steps": 40} | changed)


def pool_for(*models: torch.nn.Module, **settings: Any) -> TeacherPool:
    return TeacherPool(flags(teachers=tuple("abcd"[: len(models)])), models, **settings)


def pool_of(cfg: DistillFlags, **settings: Any) -> TeacherPool:
    return TeacherPool(cfg, [torch.nn.Linear(4, 8) for _ in cfg.teachers], **settings)


class FakeRun:
    """Of a run what the teachers need of it."""

    def __init__(self, cfg: DistillFlags, first: int = 0, **fields: Any) -> None:
        self.cfg, self.first, self.complete, self.fields, self.clock = cfg, first, first, fields, Stopwatch({})
        self.said: list[str] = []
        self.say, self.update = self.said.append, self.fields.update
        self.recall, self.ends = self.fields.get, list[Any]()
        self.befores: list[Any] = []
        self.at_end, self.before_step = self.ends.append, self.befores.append


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A world of one without a process group."""
    monkeypatch.setattr(pool_module, "total", lambda value: value)


def step_of(number: int, micro_batches: Sequence[Any] = ()) -> Any:
    return SimpleNamespace(number=number, micro_batches=micro_batches, log=lambda **_: None)


@dataclass(frozen=True)
class Micro:
    inputs: tuple[torch.Tensor, ...]
    keys: tuple[torch.Tensor, ...] = ()

    def to(self, device: torch.device) -> "Micro":
        return self


def test_teachers_are_frozen_and_answer_without_gradients() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5))
    pool = pool_for(model.train())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inputs = torch.randn(16, 4)
    first, second = (pool.say((0,), Micro((inputs,))) for _ in range(2))
    assert torch.equal(first, second), "dropout is active"
    assert not first.requires_grad
    assert not any(param.requires_grad for param in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} changed"


def test_several_drawn_teachers_answer_with_their_mean_probabilities() -> None:
    models = [torch.nn.Linear(4, 8) for _ in range(3)]
    pool = pool_for(*models)
    inputs = torch.randn(5, 4)
    expected = torch.stack([models[i](inputs).softmax(-1) for i in (0, 2)]).mean(0)
    torch.testing.assert_close(pool.say((0, 2), Micro((inputs,))).softmax(-1), expected)


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is given back by glibc's malloc_trim")
def test_all_teachers_are_consulted_beside_the_steps_and_their_seconds() -> None:
    torch.manual_seed(0)
    clock = Stopwatch({})
    pool = pool_for(torch.nn.Linear(4, 8), torch.nn.Linear(4, 8), columns=6, clock=clock)
    micro = SimpleNamespace(inputs=(torch.randn(3, 4),))
    said = pool.consult(micro)
    wanted = torch.stack([model(*micro.inputs)[:, :6].softmax(1) for model in pool.models.values()]).mean(0)
    torch.testing.assert_close(said.softmax(1), wanted)
    assert not said.requires_grad and clock.calls == {}
    asked = pool_for(torch.nn.Linear(4, 8), ask=lambda model, micro: ("asked", model, micro))
    assert asked.consult(micro) == ("asked", asked.models[0], micro)


def test_release_gives_the_memory_back() -> None:
    process = psutil.Process()
    TeacherPool(flags()).release()  # what earlier tests have freed, which the pool would take up again
    before = process.memory_info().rss
    # Many small tensors: one large one would be given back by free() alone.
    pool = pool_for(torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(12_000))))
    held = process.memory_info().rss - before
    assert held > 150e6
    pool.release()
    assert len(pool) == 0
    assert process.memory_info().rss - before < 0.15 * held


@pytest.mark.parametrize("shard", ["../a.safetensors", "/a.safetensors", "sub/a.safetensors", 3])
def test_an_index_names_no_file_of_another_folder(shard: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "a.safetensors"}}))
    assert model_source(str(tmp_path)) == str(tmp_path)
    index.write_text(json.dumps({"weight_map": {"w": shard}}))
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json names .* no file of this folder"):
        model_source(str(tmp_path))


def test_model_source_knows_runs_folders_and_hub_names(tmp_path: Path) -> None:
    assert model_source("google-bert/bert-base-uncased") == "google-bert/bert-base-uncased"
    hf = tmp_path / "run" / "hf"
    hf.mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="has not finished"):
        model_source(str(tmp_path / "run"))
    for name in ("config.json", "model.safetensors"):
        (hf / name).write_text("")
    assert model_source(str(tmp_path / "run")) == str(hf)
    assert model_source(str(hf)) == str(hf)
    with pytest.raises(FileNotFoundError, match="no model folder there"):
        model_source(str(tmp_path / "nowhere"))


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    BertForMaskedLM(BertConfig(vocab_size=64, max_position_embeddings=16, **shape)).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ([], "cannot be loaded: .* must be a mapping, not list"),
        (None, "cannot be loaded: argument of type 'NoneType' is not iterable"),
        ({"hidden_size": "x"}, "cannot be loaded: .*Field 'hidden_size' expected int, got str"),
        ({"num_attention_heads": 0}, "cannot be loaded: integer modulo by zero"),
        ({"intermediate_size": 16}, "lacks 3 weights of BertForMaskedLM, or has them in other shapes: bert"),
        ({"num_hidden_layers": 2}, "lacks 16 weights of BertForMaskedLM, or has them in other shapes: bert"),
        (
            {"num_hidden_layers": 0},
            "has 16 weights that BertForMaskedLM with its config.json does not take: bert.encoder.layer.0.attention.output.Lay",
        ),
        ({"tie_word_embeddings": False}, "lacks 2 weights of BertForMaskedLM, .*: cls.predictions.decoder.bias"),
        ({}, "has 16 positions, fewer than --seq-len 32; lower --seq-len"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_in_one_line(
    changed: Any, message: str, bert: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config, before = json.loads((bert / "config.json").read_text()), logging.get_verbosity()
    (bert / "config.json").write_text(json.dumps(config | changed if isinstance(changed, dict) else changed))
    with pytest.raises(ValueError, match=message) as refused:
        load_pretrained(BertForMaskedLM, str(bert), 64, seq_len=32)
    assert len(str(refused.value).splitlines()) == 1
    assert "REPORT" not in capfd.readouterr().err
    assert logging.get_verbosity() == before


def test_weights_that_nothing_takes_are_refused_and_other_heads_are_not(bert: Path) -> None:
    file = bert / "model.safetensors"
    whole = load_file(file)
    old = {"bert.embeddings.position_ids": torch.arange(16), "cls.seq_relationship.weight": torch.ones(2, 8)}
    save_file(whole | old | {"bert.pooler.dense.weight": torch.ones(8, 8)}, file, {"format": "pt"})
    load_pretrained(BertForMaskedLM, str(bert), 64, seq_len=16)
    for name in (
        "attention.self.distance_embedding.weight",
        "attention.self.query.lora_A.weight",
        "output.adapter.bias",
    ):
        added = f"bert.encoder.layer.0.{name}"
        save_file(whole | {added: torch.ones(8, 8)}, file, {"format": "pt"})
        with pytest.raises(ValueError, match=f"has 1 weights that BertForMaskedLM .* does not take: {added}; correct"):
            load_pretrained(BertForMaskedLM, str(bert), 64, seq_len=16)


def test_draws_need_no_state_and_end_with_the_window() -> None:
    cfg = flags(sampler="round_robin", kd_start=0.25, kd_stop=0.5, kd_every=2)
    draws = [pool_of(cfg).draw(step) for step in range(40)]
    assert draws[10:20] == [(0,), (), (1,), (), (2,), (), (3,), (), (0,), ()]
    assert not any(draws[:10] + draws[20:])


def test_no_teacher_is_asked_where_its_term_has_no_weight() -> None:
    falling = pool_of(flags(kd_ratio_stop=0.0, kd_stop=0.5))
    assert falling.draw(18) and not falling.draw(19)
    rising = pool_of(flags(kd_ratio=0.0, kd_ratio_stop=0.5))
    assert rising.draw(1) and not rising.draw(0)


def test_weights_are_those_given_or_measured() -> None:
    weights = one_over_perplexity([5.0, 5.0, 5.0 + math.log(3), 1000.0])
    assert weights == pytest.approx((1, 1, 1 / 3, 0)) and weights[3] > 0
    assert pool_of(flags(sampler="weighted", teacher_weights=(1, 2, 3, 4))).weights == (1, 2, 3, 4)


def test_a_sharded_pool_is_dealt_to_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [teachers_of_rank(4, rank, 2) for rank in range(2)] == [(0, 2), (1, 3)]
    assert [teachers_of_rank(2, rank, 4) for rank in range(4)] == [(0,), (1,), (0,), (1,)]
    with pytest.raises(ValueError, match="divides the 2 rank"):
        teachers_of_rank(3, 0, 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    cfg = flags(sampler="per_rank", teacher_placement="sharded")
    for rank in range(2):
        drawn = {pool_of(cfg).draw(step, rank) for step in range(40)}
        assert drawn == {(index,) for index in teachers_of_rank(4, rank, 2)}
    names = pool_of(cfg).names(3)
    assert len(names) == 2 and names[0] in "ac" and names[1] in "bd"
    monkeypatch.setenv("RANK", "1")
    pool = pool_of(cfg)
    pool.keep_held()
    assert sorted(pool.models) == [1, 3]
    assert pool.device_bytes() == [0, 160, 0, 160]


def test_a_source_named_twice_is_loaded_once(tmp_path: Path, alone: None) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("")
    (tmp_path / "link").symlink_to(tmp_path)
    loaded = []

    def load(path: str) -> torch.nn.Module:
        loaded.append(path)
        return torch.nn.Linear(4, 8)

    run: Any = FakeRun(flags(teachers=(str(tmp_path), str(tmp_path / "link"))))
    pool = gather(run, load, lambda model: {"eval/loss": 1.0}, describe=lambda model: {"width": model.out_features})
    assert len(loaded) == 1
    assert pool.models[0] is pool.models[1]
    assert [(one["eval/loss"], one["width"]) for one in pool.known] == [(1.0, 8)] * 2


def test_a_teacher_that_changes_its_buffers_is_found() -> None:
    model = torch.nn.BatchNorm1d(4)
    pool = pool_for(model)
    pool.say((0,), Micro((torch.randn(8, 4),)))
    pool.check_unchanged()
    model.train()
    pool.say((0,), Micro((torch.randn(8, 4),)))
    with pytest.raises(RuntimeError, match="teacher a has changed its buffers"):
        pool.release()


def test_a_resumed_run_refuses_a_teacher_that_has_changed(tmp_path: Path) -> None:
    model = torch.nn.Linear(4, 8)
    cfg = flags(teachers=("a",), out=str(tmp_path), resume=True)
    run = {"recipe": "r", "config": json.loads(json.dumps(dataclasses.asdict(cfg))), "world_size": 1}

    def write(**fields: Any) -> None:
        (tmp_path / "run.json").write_text(json.dumps(run | fields))

    write(teachers=[{"name": "a"}])  # by an older version
    check_unchanged(cfg, [fingerprint(model)])
    write(teachers=[{"name": "a", "fingerprint": fingerprint(model)}])
    check_unchanged(cfg, [fingerprint(model)])
    model.weight.data[0, 0] += 1e-3
    with pytest.raises(ValueError, match="--teachers a is not what the run began with"):
        check_unchanged(cfg, [fingerprint(model)])


def test_a_resumed_run_needs_no_teachers_behind_its_window(tmp_path: Path) -> None:
    cfg = flags(teachers=("a", "cache:b"), out=str(tmp_path), resume=True, kd_stop=0.55)
    run = {"recipe": "r", "config": json.loads(json.dumps(dataclasses.asdict(cfg))), "world_size": 1}
    (tmp_path / "run.json").write_text(
        json.dumps(run | {"teachers": [{"fingerprint": "1"}, {"fingerprint": {"s": 3}}]})
    )
    for step, owed, needed in ((21, None, True), (22, '{"step": 22}', True), (22, None, False)):
        checkpoint = tmp_path / "checkpoints" / f"step{step:08d}"
        checkpoint.mkdir(parents=True, exist_ok=True)
        torch.save({"owed": owed}, checkpoint / "state.pt")
        assert still_needed(cfg) == needed
    assert cache_logits.check(cfg, Shared, {}) == {"s": 3}
    (tmp_path / "run.json").write_text(json.dumps(run | {"teachers": [{}, {}]}))  # by an older version
    assert still_needed(cfg)


class Shared(cache_logits.BuildFlags):
    SHARED = ("s",)


def test_a_teacher_whose_score_is_not_finite_is_refused() -> None:
    run: Any = FakeRun(flags(teachers=("a",)))
    with pytest.raises(ValueError, match=r"--teachers a answers with no finite numbers \(eval/loss nan\)"):
        gather(run, lambda _: torch.nn.Linear(4, 8), lambda _: {"eval/loss": math.nan})


def test_teachers_that_are_not_asked_are_not_loaded_and_it_is_said() -> None:
    run: Any = FakeRun(flags(kd_ratio=0.0))
    assert not len(gather(run, lambda _: pytest.fail("loaded")))
    assert run.said == ["--teachers are not used: --kd-ratio is 0"]


def test_what_was_known_of_teachers_is_known_behind_the_closed_window() -> None:
    known = [{"name": "a", "width": 8}]
    run: Any = FakeRun(flags(teachers=("a",), kd_stop=0.5), first=20, teachers=known)
    pool = gather(run, lambda _: pytest.fail("loaded"), describe=lambda model: {"width": 1})
    assert pool.known == known


def test_the_run_lets_the_teachers_go_before_the_first_step_behind_the_window(alone: None) -> None:
    run: Any = FakeRun(flags(teachers=("a",), kd_stop=0.5))
    pool = gather(run, lambda _: torch.nn.Linear(4, 8))
    for step, left in ((0, 1), (19, 1), (20, 0)):
        for function in run.befores:
            function(step)
        assert len(pool) == left
    assert run.said[-1] == "step 20: the window has closed, the teachers are released"


def test_a_teacher_is_asked_for_what_the_method_needs(alone: None) -> None:
    run: Any = FakeRun(flags(teachers=("a",)))
    pool = gather(run, lambda _: torch.nn.Linear(4, 8), ask=lambda model, micro: (model.weight, micro.inputs[0]))
    ((micro, answer),) = pool.answers(step_of(0, [Micro((torch.randn(3, 4),))]))
    weight, inputs = answer()
    assert weight.shape == (8, 4) and inputs is micro.inputs[0]
    for changed, flag in (({"sampler": "all"}, "--sampler"), ({"teachers": ("cache:a",)}, "--teachers")):
        refused: Any = FakeRun(flags(**{"teachers": ("a", "b")} | changed))
        with pytest.raises(ValueError, match=f"{flag} must be"):
            gather(refused, lambda _: torch.nn.Linear(4, 8), ask=lambda model, micro: None)


def test_a_record_has_no_nan_in_its_result(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"recipe": "r", "config": {}, "world_size": 1}')
    run = Record(tmp_path, flags())
    run.begin(flags(), 0, 0)
    (tmp_path / "metrics.jsonl").write_text('{"step": 40, "eval/loss": NaN}\n')
    run.finish("finished")
    result = json.loads((tmp_path / "run.json").read_text())["result"]
    assert result == {"step": 40, "eval/loss": None, "stopped": "finished"}


class Constant(CachedTeacher):
    def forward(self, keys: torch.Tensor, temperature: float) -> torch.Tensor:
        return keys[:, None].float().repeat(1, 8) * temperature


def test_answers_come_from_models_by_inputs_and_from_caches_by_keys_and_are_counted() -> None:
    cfg = flags(teachers=("a", "cache:b"), sampler="round_robin", temperature=2.0)
    linear, clock = torch.nn.Linear(4, 8), Stopwatch({})
    pool = TeacherPool(cfg, [linear, Constant()], columns=6, clock=clock)
    micro_batches = [Micro((torch.randn(3, 4),), (torch.arange(3) + i,)) for i in range(2)]
    for step in range(3):
        for micro, answer in pool.answers(step_of(step, micro_batches), temperature=2.0):
            expected = linear(*micro.inputs)[:, :6] if step != 1 else micro.keys[0][:, None] * 2.0 * torch.ones(6)
            torch.testing.assert_close(answer(), expected)
    assert (clock.calls["teacher"], clock.calls["teacher/0"], clock.calls["teacher/1"]) == (6, 4, 2)
    closed = pool_of(flags(kd_stop=0.5))
    closed.release_if_closed(19)
    assert len(closed) == 4
    closed.release_if_closed(20)
    assert not len(closed), "released"
    assert [answer() for _, answer in closed.answers(step_of(20, micro_batches))] == [None, None]


class FakeEvent:
    """What `PinnedTeachers` needs of CUDA, recording the order of what is asked of the streams."""

    log: ClassVar[list[Any]] = []

    def record(self) -> None:
        self.log.append(("record", id(self)))


class FakeStream:
    def __init__(self, *_: Any) -> None: ...

    def wait_event(self, event: FakeEvent) -> None:
        FakeEvent.log.append(("wait", id(event)))


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **settings: empty(*size, **settings))
    for name, value in (("Event", FakeEvent), ("Stream", FakeStream), ("stream", contextlib.nullcontext)):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "current_stream", FakeStream)


def test_pinned_teachers_share_two_slots_and_answer_as_before(fake_cuda: None) -> None:
    """The order of copies and uses; that copies overlap with computing is for tests/recipes/test_gpu.py."""
    sizes = (8, 16, 4, 12)
    models = [
        torch.nn.Sequential(torch.nn.Linear(4, size), torch.nn.BatchNorm1d(size), torch.nn.Linear(size, 8)).eval()
        for size in sizes
    ]
    inputs = torch.randn(5, 4)
    expected = [model(inputs) for model in models]
    pinned = PinnedTeachers(models, torch.device("cpu"))

    def inside() -> list[int]:
        slots = [slot.untyped_storage().data_ptr() for slot in pinned._slots]
        return [i for i, model in enumerate(models) if model[0].weight.untyped_storage().data_ptr() in slots]

    assert len(pinned._slots) == 2 and inside() == []
    draws = np.random.default_rng(0).integers(4, size=60).tolist()
    for drawn, upcoming in itertools.pairwise(draws):
        with pinned.on_device(models[drawn]):
            pinned.prefetch(models[upcoming])
            assert {drawn, upcoming} <= set(inside()) and len(inside()) <= 2
            torch.testing.assert_close(models[drawn](inputs), expected[drawn], rtol=0, atol=0)
