"""--fused-head trains the BERT recipe as the logits do, on one process and on 2 ranks that share all weights (ZeRO-3)."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kd_core.kernels.linear_softmax_kl import linear_softmax_kl
from kd_core.text import bert
from tests import warm
from tests.recipes.conftest import RECIPE, SMALL, metrics

Train = Callable[..., subprocess.CompletedProcess[str]]


def losses(folder: Path) -> list[float]:
    return [line[name] for line in metrics(folder) for name in ("loss", "label_loss", "kd_loss", "grad_norm")]


def test_the_loss_is_that_of_the_logits(
    train: Train, teacher: Path, corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    flags = ["--teachers", str(teacher), "--teacher-dtype", "fp32", "--kd-ratio", "0.9", "--kd-stop", "0.5"]
    flags += ["--dropout", "0"]  # ranks draw their own
    train(*flags, "--out", tmp_path / "logits")
    train(*flags, "--fused-head", "--out", tmp_path / "fused")
    expected = losses(tmp_path / "logits")
    assert losses(tmp_path / "fused") == pytest.approx(expected, rel=1e-4)
    costs = [json.loads((tmp_path / name / "run.json").read_text())["teachers"][0] for name in ("logits", "fused")]
    assert costs[0]["forwards"] == costs[1]["forwards"] == 8 and costs[1]["seconds"] > 0
    config = tmp_path / "zero3.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}))
    flags += ["--data", str(corpus_file), "--deepspeed-config", str(config), "--out", str(tmp_path / "sharded")]
    done = warm.ranks(2, [RECIPE, *SMALL, *flags, "--fused-head"], KD_CACHE=str(cache))
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "sharded") == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("labels_alone", [False, True])
def test_the_model_gives_the_losses_of_its_logits(labels_alone: bool) -> None:
    """With the transform and the bias of BERT's head, and gradients down to the embeddings that the head shares."""
    model: Any = bert.build("tiny", 1000, seed=17, seq_len=128, dropout=0.0)
    torch.nn.init.normal_(model.cls.predictions.bias)
    inputs, labels = (torch.randint(1000, (3, 16)), torch.tensor([0, 5, 17, 47])), torch.tensor([4, -100, 7, 999])
    teacher = (None, None) if labels_alone else (torch.randn(4, 24), torch.randn(1000, 24))
    options = {"kd_weight": 0.9, "label_weight": 0.1, "valid_columns": 1000}
    results = []
    for fused in (True, False):
        model.zero_grad()
        if fused:
            loss, *_ = model(*inputs, *teacher, labels, **options)
        else:
            hidden, head = model(*inputs, head=False), model.get_output_embeddings()
            loss, *_ = linear_softmax_kl(
                hidden, head.weight, *teacher, labels, student_bias_V=head.bias, impl="reference", **options
            )
            torch.testing.assert_close(model(*inputs), hidden @ head.weight.t() + head.bias)
        loss.backward()
        results.append({name: param.grad for name, param in model.named_parameters()})
    assert len(results[0]) > 20
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)
