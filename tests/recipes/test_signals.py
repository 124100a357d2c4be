"""The grids: every signal to every process of every form of a run; and kill -9 in chains, exact to the byte. -s prints them."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests import warm
from tests.conftest import ROOT, cpu_environment, free_port
from tests.recipes.conftest import wait_for_step
from tests.recipes.headers import command, header
from tests.recipes.test_every_recipe import begin, exported, lines, result, run

TOY = ROOT / "tests" / "recipes" / "toys" / "long_steps.py"
LONG = (
    "--steps 1000000 --global-batch-size 4 --micro-batch-size 2 --log-every 1 --eval-every 1000000 --save-every 1000000"
)
RUNNER = [sys.executable, "-m", "deepspeed.launcher.runner", "-q", "--num_gpus", "2", "--master_port"]
FORMS = {
    "python": lambda: [sys.executable],
    "deepspeed": lambda: [*RUNNER, str(free_port())],
    "bash": lambda: [sys.executable, "-m", "kd_core.launch"],  # what a launch file becomes
    "torchrun": lambda: [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
    ],
}
PROCESSES = {
    "python": ["rank 0"],
    "deepspeed": ["deepspeed", "its launcher", "rank 0", "rank 1"],
    "bash": ["kd_core.launch", "deepspeed", "its launcher", "rank 0", "rank 1", "sh"],
    "torchrun": ["torchrun", "rank 0", "rank 1"],
}
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
SECONDS = 40.0  # besides a step and a checkpoint, which take none here


def name_of(process: psutil.Process) -> str:
    words = process.cmdline()
    known = {
        "kd_core.launch": "kd_core.launch", "deepspeed.launcher.runner": "deepspeed",
        "deepspeed.launcher.launch": "its launcher", "torch.distributed.run": "torchrun",
    }  # fmt: skip
    found = [name for word, name in known.items() if word in words]
    return (
        found[0] if found else f"rank {process.environ().get('RANK', 0)}" if str(TOY) in words else Path(words[0]).name
    )


def tree(root: int) -> dict[str, psutil.Process]:
    top = psutil.Process(root)
    return {name_of(process): process for process in [*top.children(recursive=True), top]}


def told(out: Path, log: Path) -> str:
    """What became of the steps: saved, or lost and said so; LOST otherwise."""
    result = json.loads((out / "run.json").read_text()).get("result", {})
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    if result.get("step") == last and (out / "checkpoints" / f"step{last:08d}" / "manifest.json").exists():
        return "saved"
    return "said" if "are lost" in log.read_text() else "LOST"


def cell(form: str, name: str, number: int, times: int, folder: Path) -> tuple[str, float, int]:
    """Starts a run, sends a signal to one of its processes; what was saved, the seconds it took, and what is left running."""
    out, log = folder / "run", folder / "log"
    folder.mkdir()
    words = [*FORMS[form](), str(TOY), *LONG.split(), "--deepspeed-config", "zero0_fp32_cpu.json", "--out", str(out)]
    with log.open("w") as file:
        env = cpu_environment(PYTHONPATH=str(ROOT), NUM_GPUS="2")
        run = subprocess.Popen(words, env=env, stdout=file, stderr=file, start_new_session=True)
    wait_for_step(out, 3, run)
    processes = tree(run.pid)
    assert set(processes) == set(PROCESSES[form]), f"another tree: {sorted(processes)}"
    began = time.monotonic()
    for _ in range(times):
        with contextlib.suppress(psutil.NoSuchProcess):  # the second time
            processes[name].send_signal(number)
        time.sleep(0.2)
    with contextlib.suppress(subprocess.TimeoutExpired):
        run.wait(SECONDS)
    _, left = psutil.wait_procs(
        [one for one in processes.values() if one.pid != run.pid], max(0, began + SECONDS - time.monotonic())
    )
    seconds = time.monotonic() - began
    for one in left:
        one.kill()
    if run.poll() is None:
        run.kill()
        run.wait()
        left.append(processes[name])
    return told(out, log), seconds, len(left)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_no_signal_to_any_process_leaves_anything_running_or_loses_a_step(form: str, tmp_path: Path) -> None:
    columns = [(number, times) for number in SIGNALS for times in (1, 2)]
    heads = [f"{signal.Signals(number).name[3:]}{' twice' * (times - 1)}" for number, times in columns]
    print("\n" + " | ".join([f"{form:>24}", *(f"{head:>12}" for head in heads)]))
    bad = []
    for name in PROCESSES[form]:
        cells = []
        for number, times in columns:
            what, seconds, left = cell(form, name, number, times, tmp_path / f"{name} {number} {times}")
            cells.append(f"{what} {seconds:.0f} s" + f", {left} left" * bool(left))
            if left or what == "LOST":
                bad.append((name, signal.Signals(number).name, times, cells[-1]))
        print(" | ".join([f"{name:>24}", *(f"{one:>12}" for one in cells)]), flush=True)
    assert not bad


PHASES = {  # where a run is killed, by what is on the disk then
    "begun": lambda out: (out / "run.json").exists(),
    "a step": lambda out: len(lines(out)) >= 2,
    "saving": lambda out: (out / "checkpoints" / ".incomplete").exists(),
    "a later step": lambda out: len(lines(out)) >= 5,
    "saved": lambda out: (out / "checkpoints" / "step00000006").exists(),
    "exporting": lambda out: (out / ".hf.tmp").exists(),
}
CHAINS = [(recipe, stage) for recipe in ("bert_kd", "resnet_kd") for stage in range(4)]


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "stage"), CHAINS)
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bytes(recipe: str, stage: int, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    script = ROOT / "recipes" / f"{recipe}.py"
    words = [*command(header(script)["Smoke"]), "--kd-ratio", "0", "--deepspeed-config", str(config)]
    words += "--steps 8 --save-every 3 --eval-every 4 --log-every 1".split()
    run(words + ["--out", "whole"], 2, tmp_path)
    out, kills = tmp_path / "killed", 0
    for reached in PHASES.values():
        again = ["--resume"] if (out / "run.json").exists() else []
        started = begin([*words, "--out", "killed", *again], 2, tmp_path)
        while not reached(out) and any(one.poll() is None for one in started):
            time.sleep(0.002)
        kills += any(one.poll() is None for one in started)
        warm.kill(started)
        if out.exists() and result(out):
            break  # it was too fast to be killed there
    if not result(out):
        run([*words, "--out", "killed", "--resume"], 2, tmp_path)
    assert kills >= 4
    assert lines(out) == lines(tmp_path / "whole")
    assert exported(out) == exported(tmp_path / "whole")
    print(f"\n{recipe} on ZeRO {stage}: killed {kills} times, exact to the byte")
