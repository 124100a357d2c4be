"""The launch files of both recipes in every form that they are started in, and the small preset's own teacher."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from kd_core import cli
from tests.conftest import ROOT, cpu_environment, free_port
from tests.recipes.conftest import SMALL

SHORT = [*SMALL, "--steps", "2", "--save-every", "2", "--eval-every", "2"]


def run(*command: object, cwd: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    env = cpu_environment(KD_CACHE=str(cache), PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, timeout=240)


def launch_forms(tmp_path: Path) -> dict[str, list[object]]:
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=1\n")
    kd, baseline = ROOT / "launch" / "bert_kd.sh", ROOT / "launch" / "bert_baseline.sh"
    port = ["--master_port", free_port()]
    return {
        "deepspeed": ["deepspeed", "--num_gpus", 2, *port, kd],
        "hostfile": [
            *("deepspeed", "--hostfile", hosts, "--no_ssh", "--node_rank", 0, "--master_addr", "127.0.0.1"),
            *(*port, kd),
        ],
        "bash": ["bash", baseline],
        "direct": [kd],
    }


@pytest.mark.parametrize(
    "form", ["deepspeed", "bash", *(pytest.param(form, marks=pytest.mark.slow) for form in ("hostfile", "direct"))]
)
def test_every_form_trains(form: str, teacher: Path, corpus_file: Path, cache: Path, tmp_path: Path) -> None:
    flags = [*SHORT, "--data", corpus_file, "--teachers", teacher, "--out", tmp_path / "run out"]
    words = launch_forms(tmp_path)[form]
    done = run(*words, *flags, cwd=tmp_path, cache=cache)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "no GPU here: running the small preset" in done.stderr
    record = json.loads((tmp_path / "run out" / "run.json").read_text())
    assert record["result"]["stopped"] == "finished"
    assert record["world_size"] == (2 if form == "deepspeed" else 1)
    assert record["config"]["kd_ratio"] == (0 if form == "bash" else 0.9)
    assert not (tmp_path / "runs").exists(), "a teacher was trained although --teachers names one"


@pytest.mark.slow
def test_the_small_preset_runs_on_two_ranks_as_it_stands(corpus_file: Path, cache: Path, tmp_path: Path) -> None:
    words = ["deepspeed", "--num_gpus", 2, "--master_port", free_port(), ROOT / "launch" / "bert_baseline.sh"]
    done = run(*words, "--steps", 10, "--data", corpus_file, cwd=tmp_path, cache=cache)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "runs" / "bert_kd" / "1" / "run.json").read_text())
    assert (record["world_size"], record["result"]["step"]) == (2, 10)


def test_the_resnet_files_train_on_two_ranks_and_without_a_teacher(
    image_folder: Path, cache: Path, tmp_path: Path
) -> None:
    short = ["--data", image_folder, "--steps", 2, "--global-batch-size", 16, "--micro-batch-size", 8]
    done = run("bash", ROOT / "launch" / "resnet50_baseline.sh", *short, "--out", "one", cwd=tmp_path, cache=cache)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "no GPU here: running the small preset" in done.stderr
    two = ["deepspeed", "--num_gpus", 2, "--master_port", free_port(), ROOT / "launch" / "resnet50_kd.sh"]
    done = run(*two, *short, "--teachers", "one", "--out", "two", cwd=tmp_path, cache=cache)
    assert done.returncode == 0, done.stderr[-3000:]
    for folder, ranks, ratio in (("one", 1, 0), ("two", 2, 0.9)):
        record = json.loads((tmp_path / folder / "run.json").read_text())
        assert (record["recipe"], record["world_size"]) == ("resnet_kd", ranks)
        assert (record["config"]["kd_ratio"], record["config"]["student"]) == (ratio, "resnet8")
    assert not (tmp_path / "runs").exists(), "a teacher was trained although --teachers names one"


@pytest.mark.slow
def test_the_causal_files_train_their_teacher_on_the_same_rows(tmp_path: Path, cache: Path) -> None:
    """On prompts and responses, padded: the small preset's teacher reads them as the student does."""
    records = [{"asked": f"Say {number}: ", "said": f"it is {number}."} for number in range(200)]
    (tmp_path / "said.jsonl").write_text("\n".join(map(json.dumps, records)))
    script = tmp_path / "small.py"
    script.write_text(
        "import runpy\n"
        "from kd_core.presets import launch\n"
        f"names = runpy.run_path({str(ROOT / 'launch' / 'causal_lm_kd.sh')!r})\n"
        "if __name__ == '__main__':\n"
        "    short = ' --steps 2 --student 1x64'\n"
        "    launch(names['main'], names['Config'], names['build_data'], node='', small=names['SMALL'] + short,\n"
        "           teacher=names['SMALL_TEACHER'] + short)\n"
    )
    flags = [
        "--preset",
        "small",
        "--data",
        "said.jsonl",
        "--fields",
        "asked",
        "said",
        "--vocab-size",
        300,
        "--no-packing",
        "--seq-len",
        256,
    ]
    done = run(sys.executable, script, *flags, "--kd-ratio", 0.5, cwd=tmp_path, cache=cache)
    assert done.returncode == 0, done.stderr[-3000:]
    (teacher,) = (tmp_path / "runs" / "small_teacher").glob("*/run.json")
    (student,) = (tmp_path / "runs" / "causal_lm_kd").glob("*/run.json")
    taught, teaching = (json.loads(file.read_text()) for file in (student, teacher))
    assert taught["data"] == teaching["data"] and not teaching["config"]["packing"]
    done = run("bash", ROOT / "launch" / "causal_lm_baseline.sh", *flags[2:], "--steps", 2, cwd=tmp_path, cache=cache)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "runs" / "causal_lm_kd" / "2" / "run.json").read_text())["config"]["kd_ratio"] == 0


@pytest.mark.parametrize(
    ("file", "preset"), [("resnet50_kd.sh", "cifar"), ("bert_kd.sh", "as-released"), ("causal_lm_kd.sh", "responses")]
)
def test_a_typed_preset_wins_over_the_flags_of_a_launch_file(file: str, preset: str) -> None:
    names = runpy.run_path(str(ROOT / "launch" / file))
    cfg, flags = cli.parse(names["Config"], ["--preset", preset], names["NODE"]), names["Config"].PRESETS[preset]
    assert {name: getattr(cfg, name) for name in flags} == flags
    assert cfg.kd_ratio == 0.9 and (preset != "cifar" or cfg.peak_lr == 0.2)


def test_bad_input_comes_through_the_launcher(tmp_path: Path, cache: Path) -> None:
    done = run("bash", ROOT / "launch" / "bert_kd.sh", "--kd-stpo", "0.2", cwd=tmp_path, cache=cache)
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if line.startswith("error:")] == [
        "error: unknown flag --kd-stpo; did you mean --kd-stop? --help lists all flags"
    ]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_the_small_preset_trains_its_teacher_once(corpus_file: Path, cache: Path, tmp_path: Path) -> None:
    script = tmp_path / "small.py"
    script.write_text(
        "from kd_core.presets import launch\n"
        "from recipes.bert_kd import Config, build_data, main\n"
        "if __name__ == '__main__':\n"
        f"    flags = {' '.join(SHORT)!r}\n"
        "    launch(main, Config, build_data, node=flags, small=flags + ' --kd-ratio 0.5', teacher=flags)\n"
    )
    data = ["--data", corpus_file]
    baseline = run(sys.executable, script, *data, "--kd-ratio", 0, "--out", "baseline", cwd=tmp_path, cache=cache)
    assert baseline.returncode == 0, baseline.stderr[-3000:]
    assert not (tmp_path / "runs").exists()
    first = run(sys.executable, script, *data, "--out", "first", cwd=tmp_path, cache=cache)
    assert first.returncode == 0, first.stderr[-3000:]
    assert "teacher is not there yet: training it" in first.stderr
    second = run(sys.executable, script, *data, "--out", "second", cwd=tmp_path, cache=cache)
    assert second.returncode == 0, second.stderr[-3000:]
    assert "training it" not in second.stderr
    (folder,) = (path for path in (tmp_path / "runs" / "small_teacher").iterdir() if path.is_dir())
    for name in ("first", "second"):
        config = json.loads((tmp_path / name / "run.json").read_text())["config"]
        assert config["teachers"] == [str(folder.relative_to(tmp_path))]
