"""DeepSpeed's JSON as people have it: it works, or it is one line in our words."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kd_core.training import engine
from kd_core.training.ds_config import read_config
from kd_core.training.flags import TrainFlags

Write = Callable[[Any], str]
OFFLOADED = {
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}},
}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(content: Any) -> str:
        (tmp_path / "ds.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return str(tmp_path / "ds.json")

    return written


@pytest.mark.parametrize(
    ("content", "read"),
    [
        ({"fp16": None, "bf16": {"enabled": True}, "zero_optimization": None}, {"bf16": {"enabled": True}}),
        ({"fp16": False, "bf16": True}, {"fp16": {"enabled": False}, "bf16": {"enabled": True}}),
        ({"zero_optimization": True}, {"zero_optimization": {"stage": 1}}),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": False, "overlap_comm": None}}, {"zero_optimization": {"stage": 2}}),
        ({"bf16": {"enabled": "false"}, "wandb": False}, {"bf16": {"enabled": False}, "wandb": {"enabled": False}}),
        (OFFLOADED, OFFLOADED),
        ('\ufeff{"torch_autocast": true}', {"torch_autocast": {"enabled": True}}),
    ],
)  # fmt: skip
def test_null_is_the_default_and_a_boolean_says_whether_a_section_is_on(content: Any, read: Any, write: Write) -> None:
    assert read_config(write(content), "--deepspeed-config") == read


REFUSED: list[tuple[Any, str]] = [
    ({"zero_optimization": {"stage": "two"}}, 'zero_optimization.stage must be 0, 1, 2 or 3, got "two"'),
    ({"zero_optimization": {"stage": True}}, "zero_optimization.stage must be 0, 1, 2 or 3, got true"),
    ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage must be 0, 1, 2 or 3, got 4"),
    ({"zero_optimization": 2}, "'zero_optimization' must be an object, got 2"),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": True}}, "offload_optimizer must be an object, got true"),
    (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "gpu"}}},
        "offload_optimizer.device must be 'none', 'cpu' or 'nvme', got \"gpu\"",
    ),
    (
        {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
        "offload_param needs stage 3 or above, got 2",
    ),
    ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload_param to nvme needs nvme_path"),
    ({"zero_optimization": {"stage": 1, "compute_grad_norm": False}}, "compute_grad_norm must be true"),
    ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "5e8"}}, "zero_optimization.reduce_bucket_size must be"),
    ({"zero_optimization": {"zenflow": {"x": 1}}}, "has unknown keys ['zero_optimization.zenflow.x']"),
    ({"activation_checkpointing": {"cpu": True}}, "has unknown keys ['activation_checkpointing.cpu']"),
    ({"activation_checkpointing": True}, "'activation_checkpointing' must be an object, got true"),
    ({"prescale_gradients": "true"}, 'prescale_gradients must be true or false, got "true"'),
    ({"gradient_predivide_factor": True}, "gradient_predivide_factor must be a number, got true"),
    ('{"gradient_predivide_factor": NaN}', "has the value NaN, which is no finite number"),
    ('{"gradient_predivide_factor": 1e400}', "has the value 1e400, which is no finite number"),
    (f'{{"zero_optimization": {{"stage": 1{"0" * 5000}}}}}', "has the value 10000000000000000000, which"),
    ('{"zero_optimization": {"stage": "2"}}', 'stage must be 0, 1, 2 or 3, got "2"'),
    ('{"bf16": {"enabled": true}, "fp16": {"enabled": true}}', "enables fp16, whose loss scaling skips steps"),
    ('{ // of the cluster\n "bf16": true}', "is not valid JSON: Expecting property name"),
    ({"flops_profiler": {"profile_step": "x"}}, 'flops_profiler.profile_step must be a whole number, got "x"'),
    ({"checkpoint": {"tag_validation": "maybe"}}, "tag_validation value of MAYBE"),
    ({"zero_force_ds_cpu_optimizer": True}, "zero_force_ds_cpu_optimizer must be false"),
    ({"steps_per_print": 10}, "sets 'steps_per_print', which --log-every sets"),
    ({"wandb": {"enabled": True, "project": "x"}}, "the package wandb is not installed; pip install wandb"),
    ({"comet": True}, "the package comet_ml is not installed; pip install comet_ml"),
    ('{"bf16": {"enabled": true}, "bf16": {"enabled": false}}', "has 'bf16' twice; remove one"),
]


@pytest.mark.parametrize(("content", "message"), REFUSED)
def test_what_deepspeed_would_not_take_is_one_line(
    content: Any, message: str, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "comet_ml", None)
    with pytest.raises(ValueError) as error:
        read_config(file := write(content), "--deepspeed-config")
    text = str(error.value)
    assert text.startswith(f"--deepspeed-config {file}") and message in text, text
    assert "\n" not in text and "pydantic" not in text


def test_offloading_takes_the_recipe_s_optimizer(write: Write) -> None:
    assert engine.load_config(TrainFlags(deepspeed_config=write(OFFLOADED)))["zero_force_ds_cpu_optimizer"] is False


def test_what_deepspeed_prints_when_it_fails_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import deepspeed

    def fail(error: BaseException | None) -> Callable[..., Any]:
        def initialize(**_: Any) -> Any:
            print("the compiler is missing")
            if error is not None:
                raise error
            return "engine", None

        return initialize

    monkeypatch.delenv("KD_VERBOSE", raising=False)
    monkeypatch.setattr(deepspeed, "initialize", fail(RuntimeError("no\n  op")))
    with pytest.raises(ValueError, match=r"DeepSpeed fails on --deepspeed-config x \(RuntimeError: no op\)"):
        engine.initialize(torch.nn.Linear(1, 1), None, {}, "--deepspeed-config x")
    assert capsys.readouterr().err == "the compiler is missing\n"
    monkeypatch.setattr(deepspeed, "initialize", fail(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        engine.initialize(torch.nn.Linear(1, 1), None, {})
    assert "missing" in capsys.readouterr().err
    monkeypatch.setattr(deepspeed, "initialize", fail(None))
    assert engine.initialize(torch.nn.Linear(1, 1), None, {}) == "engine"
    assert capsys.readouterr() == ("", "")
