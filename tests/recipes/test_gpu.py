"""What only a GPU can show of the recipes. Run: ./launch/test.sh -m gpu"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from kd_core.kernels.softmax_kl import softmax_kl, softmax_kl_reference
from tests.conftest import ROOT
from tests.recipes.conftest import RECIPE, SMALL, metrics, trace

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
