"""Teachers are frozen, answer without gradients, and give their memory back."""

import sys
from pathlib import Path

import psutil
import pytest
import torch

from kd_core.teachers import TeacherPool, model_source


def test_teachers_are_frozen_and_answer_without_gradients() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5))
    pool = TeacherPool(["a"], [model.train()])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inputs = torch.randn(16, 4)
    first, second = (pool.logits((0,), (inputs,), temperature=1.0) for _ in range(2))
    assert torch.equal(first, second), "dropout is active"
    assert not first.requires_grad
    assert not any(param.requires_grad for param in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} changed"


def test_several_drawn_teachers_answer_with_their_mean_probabilities() -> None:
    models = [torch.nn.Linear(4, 8) for _ in range(3)]
    pool = TeacherPool(["a", "b", "c"], models)
    inputs = torch.randn(5, 4)
    expected = torch.stack([models[i](inputs).softmax(-1) for i in (0, 2)]).mean(0)
    torch.testing.assert_close(pool.logits((0, 2), (inputs,), temperature=1.0).softmax(-1), expected)


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is given back by glibc's malloc_trim")
def test_release_gives_the_memory_back() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    # Many small tensors: one large one would be given back by free() alone.
    pool = TeacherPool(["a"], [torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(12_000)))])
    held = process.memory_info().rss - before
    assert held > 150e6
    pool.release()
    assert len(pool) == 0
    assert process.memory_info().rss - before < 0.15 * held


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
