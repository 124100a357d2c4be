"""What only a GPU can show of the recipes. Run: ./launch/test.sh -m gpu"""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig

from kd_core.kernels.softmax_kl import softmax_kl, softmax_kl_reference
from kd_core.teachers.flags import DistillFlags
from kd_core.teachers.placement import PinnedTeachers
from kd_core.teachers.pool import TeacherPool
from kd_core.text import masking as text
from kd_core.text.bert import MaskedBert
from tests.conftest import ROOT
from tests.recipes.conftest import RECIPE, SMALL, metrics, trace
from tests.unit.test_teachers import step_of

pytestmark = pytest.mark.gpu


def train(cache: Path, *words: object, recipe: Path = RECIPE, small: Sequence[str] = SMALL) -> None:
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")
    env = {name: value for name, value in os.environ.items() if name not in launcher} | {"KD_CACHE": str(cache)}
    command = [sys.executable, str(recipe), *small, *map(str, words)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("config", ["zero1_bf16.json", "zero2_bf16.json", "zero3_bf16.json", "zero3_bf16_offload.json"])
def test_distillation_in_bf16(config: str, corpus_file: Path, cache: Path, tmp_path: Path) -> None:
    flags = ["--data", corpus_file, "--deepspeed-config", config, "--steps", 40, "--eval-every", 20]
    train(cache, *flags, "--out", tmp_path / "teacher")
    kd = ["--teachers", tmp_path / "teacher", "--kd-ratio", 0.5, "--kd-stop", 0.5]
    train(cache, *flags, *kd, "--out", tmp_path / "student")
    lines = metrics(tmp_path / "student")
    assert lines[-1]["eval/loss"] < lines[19]["eval/loss"]
    assert lines[19]["teacher_s"] == pytest.approx(lines[-1]["teacher_s"])
    assert 0 < lines[-1]["teacher_s"] < lines[-1]["train_s"]


def test_compiled_run_learns_as_the_plain_one(corpus_file: Path, cache: Path, tmp_path: Path) -> None:
    flags = ["--data", corpus_file, "--deepspeed-config", "zero1_bf16.json", "--steps", 20, "--dropout", 0]
    train(cache, *flags, "--out", tmp_path / "plain")
    train(cache, *flags, "--compile", "--out", tmp_path / "compiled")
    for plain, compiled in zip(trace(tmp_path / "plain"), trace(tmp_path / "compiled"), strict=True):
        assert compiled[1] == pytest.approx(plain[1], rel=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_softmax_kl_on_the_gpu_equals_float64(dtype: torch.dtype) -> None:
    student, teacher = (torch.randn(300, 30522, device="cuda", dtype=dtype) for _ in range(2))
    labels = torch.randint(30522, (300,), device="cuda")
    student.requires_grad_()
    truth = student.detach().double().requires_grad_()
    kd_N, label_N = softmax_kl(student, teacher, labels, temperature=2.0)
    expected = softmax_kl_reference(truth, teacher, labels, temperature=2.0)
    torch.testing.assert_close(kd_N.double(), expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(label_N.double(), expected[1], rtol=1e-4, atol=1e-5)
    (kd_N + label_N).sum().backward()
    sum(expected).sum().backward()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    assert float((student.grad - truth.grad).norm() / truth.grad.norm()) < tolerance


def test_glue_in_bf16_and_compiled_scores_as_in_float32(
    train_on_gpu: Path, glue_folder: Path, cache: Path, tmp_path: Path
) -> None:
    env = dict(os.environ) | {"KD_CACHE": str(cache)}
    recipe = [sys.executable, str(RECIPE.with_name("glue.py")), f"m={train_on_gpu}", "--data", str(glue_folder)]
    recipe += "--protocol sane --tasks CoLA STS-B --lr 1e-3 --epochs 20 --seeds 1 --dropout 0 --max-length 24".split()
    for name, words in {"fp32": ["--precision", "fp32"], "bf16": [], "compiled": ["--compile"]}.items():
        command = [*recipe, *words, "--out", str(tmp_path / name)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        for task in ("CoLA", "STS-B"):
            lines, truth = (metrics(tmp_path / run / "m" / task / "19") for run in (name, "fp32"))
            assert lines[0]["loss"] == pytest.approx(truth[0]["loss"], rel=2e-2)
            assert lines[-1]["loss"] < lines[0]["loss"]


@pytest.fixture
def train_on_gpu(corpus_file: Path, cache: Path, tmp_path: Path) -> Path:
    train(cache, "--data", corpus_file, "--deepspeed-config", "zero1_bf16.json", "--out", tmp_path / "pretrained")
    return tmp_path / "pretrained"


def pools(number: int, **placement: Any) -> TeacherPool:
    """A uniform pool of MaskedBert teachers, the same for every placement."""
    cfg = DistillFlags(
        teachers=tuple(f"teacher{i}" for i in range(number)), kd_ratio=0.9, sampler="round_robin", **placement
    )
    models: list[torch.nn.Module] = []
    for index in range(number):
        torch.manual_seed(index)
        shape: dict[str, Any] = {"num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 2048}
        models.append(MaskedBert(BertConfig(vocab_size=8192, hidden_size=512, **shape)).to(torch.bfloat16))
    device, host = torch.device("cuda"), cfg.teacher_placement == "host"
    pinned = PinnedTeachers([model.eval() for model in models], device) if host else None
    return TeacherPool(cfg, models if host else [model.to(device) for model in models], pinned=pinned)


def batch_of(micro_batches: int) -> list[text.MicroBatch]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(8192, (64, 128), generator=generator) for _ in range(micro_batches)]
    positions, keys = torch.arange(0, 64 * 128, 7), torch.zeros(64, dtype=torch.int64)
    return [text.MicroBatch(one, positions, one.flatten()[positions], keys, keys).pin_memory() for one in ids]


def answers(pool: TeacherPool, student: torch.nn.Module, steps: int) -> list[torch.Tensor]:
    """All logits of a few steps, beside the forward and backward of a student."""
    logits = []
    for step in range(steps):
        for micro, answer in pool.answers(step_of(step, batch_of(2))):
            student(micro.input_ids, micro.positions).float().logsumexp(-1).sum().backward()
            got = answer()
            assert got is not None
            logits.append(got.cpu())
    return logits


@pytest.fixture
def student() -> MaskedBert:
    torch.manual_seed(99)
    return MaskedBert(BertConfig(vocab_size=8192, num_hidden_layers=6)).to("cuda", torch.bfloat16)


AHEAD, HOST = {"teacher_ahead": True}, {"teacher_placement": "host"}


@pytest.mark.parametrize("settings", [AHEAD, HOST, AHEAD | HOST], ids=["ahead", "host", "both"])
def test_placement_and_running_ahead_change_no_bit(settings: dict[str, Any], student: MaskedBert) -> None:
    pool = pools(4)
    expected = answers(pool, student, 6)
    pool = pools(4, **settings)
    for got, wanted in zip(answers(pool, student, 6), expected, strict=True):
        assert torch.equal(got, wanted)


def test_teachers_in_pinned_memory_hold_two_on_the_gpu() -> None:
    before = torch.cuda.memory_allocated()
    one = pools(1)
    single = torch.cuda.memory_allocated() - before
    one.release()
    assert torch.cuda.memory_allocated() <= before
    pool = pools(6, teacher_placement="host")
    for step in range(12):
        for _, answer in pool.answers(step_of(step, batch_of(1))):
            answer()
    workspace = 64 * 2**20  # of cuBLAS, which stays
    assert torch.cuda.memory_allocated() - before <= 2.05 * single + workspace < 4 * single
    pool.release()
    assert torch.cuda.memory_allocated() <= before + workspace


def spans(events: Any, wanted: Callable[[str], bool]) -> list[tuple[float, float]]:
    device = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    return [(event.time_range.start, event.time_range.end) for event in device if wanted(event.name)]


def overlap_us(left: list[tuple[float, float]], right: list[tuple[float, float]]) -> float:
    return sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in left for b in right)


def test_copies_of_the_next_teacher_overlap_with_computing(student: MaskedBert) -> None:
    """Fails when the copies are put on the stream that computes."""
    pool = pools(4, teacher_placement="host")
    answers(pool, student, 4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for step in range(8):
            for micro, answer in pool.answers(step_of(step, batch_of(1))):
                student(micro.input_ids, micro.positions).float().logsumexp(-1).sum().backward()
                answer()
        torch.cuda.synchronize()
    weights = [span for span in spans(profile.events(), lambda name: "HtoD" in name) if span[1] - span[0] > 100]
    kernels = spans(profile.events(), lambda name: not name.startswith(("Mem", "mem")))
    assert len(weights) >= 7, "a weight copy a step"
    copied = sum(end - start for start, end in weights)
    assert overlap_us(weights, kernels) > 0.5 * copied


RESNET = ROOT / "recipes" / "resnet_kd.py"
SMALL_RESNET = "--preset cifar --data synthetic --global-batch-size 256 --micro-batch-size 128 --log-every 1".split()


@pytest.mark.parametrize("config", ["zero1_bf16.json", "zero2_bf16.json", "zero3_bf16.json"])
@pytest.mark.parametrize("compiled", ["--compile", "--no-compile"])
def test_resnets_distil_in_bf16(config: str, compiled: str, cache: Path, tmp_path: Path) -> None:
    flags = ["--deepspeed-config", config, compiled, "--steps", 40, "--eval-every", 20, "--teacher-dtype", "bf16"]
    train(cache, *flags, "--out", tmp_path / "teacher", recipe=RESNET, small=SMALL_RESNET)
    kd = ["--teachers", tmp_path / "teacher", "--kd-ratio", 0.5, "--kd-stop", 0.5]
    train(cache, *flags, *kd, "--out", tmp_path / "student", recipe=RESNET, small=SMALL_RESNET)
    lines = metrics(tmp_path / "student")
    assert lines[-1]["eval/loss"] < lines[0]["label_loss"]
    assert 0 < lines[19]["teacher_s"] == pytest.approx(lines[-1]["teacher_s"])


def test_nvjpeg_learns_as_the_workers(image_folder: Path, cache: Path, tmp_path: Path) -> None:
    flags = ["--data", image_folder, "--decoded-gib", 0, "--crop", "resized", "--min-scale", 0.5, "--steps", 20]
    flags += ["--global-batch-size", 64, "--micro-batch-size", 64, "--deepspeed-config", "zero1_bf16.json"]
    for decoder in ("cpu", "nvjpeg"):
        train(cache, *flags, "--decoder", decoder, "--out", tmp_path / decoder, recipe=RESNET, small=SMALL_RESNET)
    for cpu, gpu in zip(trace(tmp_path / "cpu"), trace(tmp_path / "nvjpeg"), strict=True):
        assert gpu[1] == pytest.approx(cpu[1], rel=0.1)
