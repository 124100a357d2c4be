"""Stages that train other weights, or the same with another optimizer: each a run of its own, one after the other.

    return chain.run(__file__, Config, typed, {"learners": "--stage learners", "gates": "--stage gates --student {learners}"})

Each stage lies in <out>/<stage> as a complete run folder: it has its own log, checkpoints, exact resume and cost, and its
result is a source for --student and --teachers of any other run. What has finished is kept; what was stopped, or killed,
continues by the same call. In the end <out> itself is a run folder, the last stage's with the seconds of all: so a chain is a
teacher, and an arm of a study, like any run. A stage that only changes weights of terms is no stage but a schedule of `Step.number`.
"""

import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kd_core import cli
from kd_core.runs import folders
from kd_core.runs.flags import RunFlags
from kd_core.runs.folders import MAY_MOVE, next_free, read_record, remove_if_empty, say_moved
from kd_core.runs.jobs import Job, check_inputs, check_unchanged, locked, places, run_all
from kd_core.system.checked import digests
from kd_core.system.files import write_atomic


def run(
    file: str, config: type[RunFlags], typed: Sequence[str] | None, stages: Mapping[str, str], preset: str = ""
) -> int:
    """Runs the recipe `file` for each of `stages`: with a launch file's flags `preset`, over them those `typed`, then the stage's.

    A stage is started on all GPUs of the machine, or without one on NUM_GPUS ranks (default 1), so the chain itself is
    started without a launcher. --out names the folder of all stages; --resume is understood by itself, and given it takes the
    flags from there.

    Args:
        stages: flags by name; {name} in them is the run folder of an earlier stage.

    Returns:
        The exit code, 0.

    Raises:
        SystemExit: with 2, a flag that is wrong for any stage, before the first begins; or the code of a stage that failed.
    """
    with cli.one_line_errors() as undo:
        words = list(sys.argv[1:] if typed is None else typed)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                f"{Path(file).name} starts each of its stages on all GPUs itself; without a launcher: "
                f"python {file} {shlex.join(word for word in words if not word.startswith('--local'))}"
            )
        resume = "--resume" in words
        words = [word for word in words if word != "--resume" and not word.startswith("--local")]
        words = [*shlex.split(preset, comments=True), *words]
        out, words = cli.take(words, "--out")
        folder = Path(out) if out else next_free(Path("runs") / Path(file).stem)
        undo.callback(remove_if_empty, folder)
        if resume and (folder / "run.json").exists():
            words = ["--load", str(folder / "run.json"), *words]
        count = torch.cuda.device_count()
        ranks = count or int(os.environ.get("NUM_GPUS", "1"))
        made: dict[str, Job] = {}
        configs = []
        for name, flags in stages.items():
            earlier = {other: str(job.folder) for other, job in made.items()}
            own = [*words, *(word.format(**earlier) for word in shlex.split(flags)), "--out", str(folder / name)]
            configs.append(cli.parse(config, own))
            start = [file] if ranks == 1 else ["-m", "kd_core.launch", file]
            command = [sys.executable, *start, *own]
            made[name] = Job(name, folder / name, command, configs[-1].steps, tuple(made), True)
        whole = cli.parse(config, [*words, "--out", str(folder)])
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder) as lock:
            of_stages = [(job, dataclasses.asdict(cfg)) for job, cfg in zip(made.values(), configs, strict=True)]
            # What may have been moved the stages know, the chain does not.
            of_chain = {name: value for name, value in dataclasses.asdict(whole).items() if name not in MAY_MOVE}
            moved = []
            for job, now in [(Job("", folder, (), 0, (), True), of_chain), *of_stages]:
                moved += check_unchanged(job, now, recipe=Path(file).stem, ranks=ranks)
            say_moved(moved)

            def look() -> None:
                begun = [(job, now) for job, now in of_stages if (job.folder / "run.json").exists()]
                check_inputs((job.name, now, read_record(job.folder)) for job, now in begun)

            look()
            record = folders.describe(Path(file).stem, whole) | {"world_size": ranks}
            folders.write_record(folder, record)
            run_all(list(made.values()), places(1, ranks), lock, summary, folder, "stages", look)
            conclude(folder, record, list(made.values()))
    return 0


def conclude(folder: Path, record: Mapping[str, Any], stages: Sequence[Job]) -> None:
    """Makes `folder` the run that its last stage is, described by `record`, with the seconds and the memory of all."""
    *before, (last, lines) = [folders.read_run(job.folder) for job in stages]
    earlier = [one["result"] for one, _ in before]

    def of_all(values: dict[str, Any]) -> dict[str, Any]:
        seconds = [name for name in values if name.endswith("_s")]
        return values | {name: values[name] + sum(one.get(name, 0) for one in earlier) for name in seconds}

    write_atomic(folder / "metrics.jsonl", "".join(json.dumps(of_all(line)) + "\n" for line in lines))
    for part in folders.EXPORTS:
        if (stages[-1].folder / part).exists() and not (folder / part).exists():
            (folder / part).symlink_to(Path(stages[-1].name, part))
    memory = max(one["peak_memory_gib"] for one in [*earlier, last["result"]])
    result = of_all(last["result"]) | {"peak_memory_gib": memory}
    files = last["files"] | digests(folder, ["metrics.jsonl"])
    folders.write_record(folder, {**last, **record, "result": result, "files": files})


def summary(job: Job) -> str:
    """A finished stage in a few words."""
    result = read_record(job.folder)["result"]
    scores = " ".join(
        f"{name} {value:.4f}" for name, value in result.items() if name.startswith("eval/") and value is not None
    )
    return f"{job.name} {scores}, {result['train_s']:.0f} s of training"
