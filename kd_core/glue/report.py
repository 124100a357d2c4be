"""What a GLUE evaluation writes down: each job's run folder; then glue.json, glue.md, submissions, runs for time to quality.

    OUT/<model>/<task>/<seed>/      a run folder: run.json, metrics.jsonl, tensorboard/, submission/, hf/ if kept
    OUT/<model>/submission/         of each task the predictions of the seed that is best on dev
    OUT/glue.json, OUT/glue.md      all scores; scores in JSON are fractions, in the table points (times 100)
    OUT/time_to_quality/<model>/    of a run of this project its run.json and metrics.jsonl with `glue/average` added

The last are what `python -m kd_core.time_to_quality ... --metric glue/average` reads; the run itself is left as it is.
"""

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from kd_core.glue import tasks as glue
from kd_core.glue.plan import SAME_FOR_ALL, Model, Plan, TaskJob
from kd_core.runs import folders
from kd_core.runs.record import Lines
from kd_core.system import files

METRIC = "glue/average"


# --- of one job -------------------------------------------------------------------------------------------------------


class Log:
    """The run folder of a job: `head` becomes run.json, and each line goes to metrics.jsonl and TensorBoard."""

    def __init__(self, folder: Path, head: dict[str, Any]) -> None:
        self._folder, self._head = folder, head
        folder.mkdir(parents=True, exist_ok=True)
        folders.write_record(folder, head)
        self._lines = Lines(folder, "w")

    def write(self, line: dict[str, Any]) -> None:
        self._lines.write(line)

    def finish(self, **result: Any) -> None:
        """Writes the result, last: with it the job has finished."""
        self._lines.close()
        record = self._head | {"result": {"stopped": "finished", **result}}
        record["files"] = folders.digests(self._folder)
        folders.write_record(self._folder, record)


def write_predictions(
    folder: Path, task: glue.Task, split: str, examples: glue.Examples, predicted: np.ndarray
) -> None:
    """Writes a test split's predictions as GLUE's server takes them: `index` and `prediction`, scores within 0 to 5."""
    if task.labels:
        written = [task.labels[int(label)] for label in predicted]
    else:
        written = [f"{value:.3f}" for value in predicted.clip(0, 5)]
    rows = [f"{number}\t{text}\n" for number, text in zip(examples.numbers.tolist(), written, strict=True)]
    (folder / "submission").mkdir(exist_ok=True)
    (folder / "submission" / f"{task.submitted[split]}.tsv").write_text("".join(["index\tprediction\n", *rows]))


def result(job: TaskJob) -> dict[str, Any]:
    return dict(folders.read_record(job.folder)["result"])


def summary(job: TaskJob) -> str:
    """A finished job in a few words."""
    done = result(job)
    teacher = f", its teacher {_scores(done['teacher'])}" if "teacher" in done else ""
    return f"{job.name} {_scores(done)}{teacher}, {done['seconds']:.0f} s"


def _scores(values: dict[str, Any]) -> str:
    return " ".join(f"{name.removeprefix('eval/')} {100 * v:.1f}" for name, v in values.items() if name[:5] == "eval/")


# --- of all -----------------------------------------------------------------------------------------------------------


def write(plan: Plan) -> None:
    """Writes what stands at the top of this file, and prints the table.

    All jobs have finished.
    """
    covered = [name for name in plan.settings if name in glue.AVERAGED]
    scored = {name: _scored(plan, name) for name in plan.settings}
    record: dict[str, Any] = {
        "protocol": plan.protocol,
        "data": plan.data,
        "settings": {name: value._asdict() for name, value in plan.settings.items()},
        "flags": {field: getattr(plan.jobs[0].input, field) for field in SAME_FOR_ALL},
        "teachers": {job.input.task: job.input.teacher for job in plan.jobs if job.input.teacher},
        "skipped": plan.skipped,
        "average_covers": covered,
        "notes": _notes(plan, covered),
        "majority": {
            "tasks": {name: {"score": _mean(values, scored[name]), **values} for name, values in plan.control.items()}
        },
        "models": {model.name: _model(plan, model, covered, scored) for model in plan.models},
    }
    record["majority"]["average"] = _average(record["majority"]["tasks"], covered)
    files.write_atomic(plan.folder / "glue.json", json.dumps(record, indent=2) + "\n")
    text = markdown(record)
    files.write_atomic(plan.folder / "glue.md", text)
    print(text)
    print(f"evaluation: {plan.folder / 'glue.md'}")
    for model in plan.models:
        if model.run and Path(model.source) == Path(model.run) / "hf":
            write_run(plan.folder / "time_to_quality" / model.name, model, record)


def _scored(plan: Plan, name: str) -> list[str]:
    """The metrics of a task that its score is the mean of."""
    return [metric for metric in plan.control[name] if (name, metric) not in glue.PROTOCOLS[plan.protocol].unscored]


def _mean(values: dict[str, float], names: list[str]) -> float:
    return statistics.fmean(values[name] for name in names)


def _average(tasks: dict[str, Any], covered: list[str]) -> float | None:
    return statistics.fmean(tasks[name]["score"] for name in covered) if covered else None


def _notes(plan: Plan, covered: list[str]) -> list[str]:
    notes = [f"{name} is skipped: {reason}." for name, reason in plan.skipped.items()]
    protocol = glue.PROTOCOLS[plan.protocol]
    for name, splits in plan.left_out.items():
        notes += [f"{name}: rows that lack columns are left out, {rows} of {split}." for split, rows in splits.items()]
    without = [name for name in glue.AVERAGED if name not in covered]
    notes.append(
        f"The average covers {', '.join(covered) or 'no task'}" + f", not {', '.join(without)}." * bool(without)
    )
    waiting = [name for name in protocol.from_mnli if name in covered]
    if waiting and "MNLI" not in covered:
        notes.append(f"{', '.join(waiting)}: from the pretrained model, as MNLI is not evaluated.")
    for name in plan.settings:
        answers = (result(job).get("teacher") for job in plan.jobs if job.input.task == name)
        if taught := next(filter(None, answers), None):
            note = f"The teacher of {name}: {_scores(taught)}"
            if any(taught[f"eval/{metric}"] <= value for metric, value in plan.control[name].items()):
                note += ", not above the majority class"
                note += "; its labels may be in another order (id2label)" if glue.TASKS[name].labels else ""
            notes.append(f"{note}.")
    return notes


def _model(plan: Plan, model: Model, covered: list[str], scored: dict[str, list[str]]) -> dict[str, Any]:
    tasks = {}
    for name in plan.settings:
        mine = [job for job in plan.jobs if job.name.startswith(f"{model.name}/{name}/")]
        results = {job.input.seed: result(job) for job in sorted(mine, key=lambda job: job.input.seed)}
        values = {metric: [done[f"eval/{metric}"] for done in results.values()] for metric in plan.control[name]}
        scores = [_mean({m: column[i] for m, column in values.items()}, scored[name]) for i in range(len(results))]
        best = list(results)[int(np.argmax(scores))]
        tasks[name] = {
            "score": statistics.fmean(scores),
            "spread": _spread(scores),
            "metrics": {
                metric: {"mean": statistics.fmean(column), "spread": _spread(column), "values": column}
                for metric, column in values.items()
            },
            "seeds": list(results),
            "best_seed": best,
            "seconds": statistics.fmean(done["seconds"] for done in results.values()),
        }
        there = plan.folder / model.name / "submission"
        for file in (plan.folder / model.name / name / str(best)).glob("submission/*.tsv"):
            there.mkdir(exist_ok=True)
            shutil.copyfile(file, there / file.name)
    pretraining = {"run": model.run, "step": model.step, **(model.seconds or {})} if model.run else None
    return {
        "source": model.source,
        "pretraining": pretraining,
        "average": _average(tasks, covered),
        "tasks": tasks,
    }


def _spread(values: list[float]) -> float | None:
    """The standard deviation over seeds."""
    return statistics.stdev(values) if len(values) > 1 else None


def markdown(record: dict[str, Any]) -> str:
    """The table of glue.json, in points, and what there is to know about it."""
    shown = lambda value: "-" if value is None else f"{100 * value:.2f}"
    lines = [
        "| model | task | metric | majority | mean | spread | seeds | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    majority = record["majority"]
    for name, model in record["models"].items():
        for task, row in model["tasks"].items():
            for metric, values in row["metrics"].items():
                numbers = (majority["tasks"][task][metric], values["mean"], values["spread"])
                lines.append(
                    f"| {name} | {task} | {metric} | {' | '.join(map(shown, numbers))} | {len(row['seeds'])} "
                    f"| {row['seconds']:.0f} |"
                )
        lines.append(f"| {name} | average | | {shown(majority['average'])} | {shown(model['average'])} | | | |")
    runs = [(name, model) for name, model in record["models"].items() if model["pretraining"]]
    if len(runs) > 1:
        lines += ["", "| model | step | seconds of pretraining | average |", "|---|---|---|---|"]
        for name, model in runs:
            spent = model["pretraining"]
            lines.append(f"| {name} | {spent['step']} | {spent['train_s']:.0f} | {shown(model['average'])} |")
    notes = [
        f"Protocol {record['protocol']}, dev sets, points; spread: standard deviation over seeds.",
        *record["notes"],
    ]
    return "\n".join([*lines, "", *notes]) + "\n"


def write_run(folder: Path, model: Model, record: dict[str, Any]) -> None:
    """Copies `model`'s run.json and metrics.jsonl into `folder`, adding `glue/average` where it was evaluated.

    How it was fine-tuned goes into `config`, so that time to quality refuses runs that were evaluated otherwise.
    """
    points = [
        (other["pretraining"], other["average"])
        for other in record["models"].values()
        if other["pretraining"] and other["pretraining"]["run"] == model.run and other["average"] is not None
    ]
    if not points:
        return
    run, logged = folders.read_run(Path(str(model.run)))
    how = ("protocol", "data", "settings", "flags", "teachers", "average_covers")
    run["config"] |= {f"glue_{name}": record[name] for name in how}
    lines = {line["step"]: line for line in logged}
    for spent, average in points:
        step = spent["step"]
        samples = {"samples": step * run["config"]["global_batch_size"]}
        spent = {name: value for name, value in spent.items() if name != "run"}
        lines[step] = lines.get(step, samples | spent) | {METRIC: average}
        if step == run["result"]["step"]:
            run["result"][METRIC] = average
    folder.mkdir(parents=True, exist_ok=True)
    ordered = "".join(json.dumps(lines[step]) + "\n" for step in sorted(lines))
    files.write_atomic(folder / "metrics.jsonl", ordered)
    folders.write_record(folder, run | {"files": folders.digests(folder)})
