"""The runs of a study in two small text files, made to be committed: what their flags were, what they said, what they cost.

    runs.json   run.json of all runs, each entry once: what the runs of all arms share under "all", those of an arm under its
                name in "arms", the rest under the run's name in "runs"
    runs.csv    a line an evaluation, and a run's last line: run, step, train_s, teacher_s, data_s, kd_ratio, metrics

A run is named by its folder within the study's, ARM/STEPS/SEED, or by a single word if the study prepared it for the
arms. What stands here counts as finished: weights, checkpoints and the log's other lines are left out.
"""

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Number
from pathlib import Path
from typing import Any

from kd_core.runs import folders
from kd_core.system.checked import SEAL, read_json, sealed
from kd_core.system.files import write_atomic

COSTS = ("train_s", "teacher_s", "data_s")
COLUMNS = ("run", "step", *COSTS, "kd_ratio")
DIGITS = 7  # of a number in runs.csv
LEFT_OUT = ("argv", "files", "id", "result", "saved")  # of run.json; the result's values are the last line's
OF_RESULT = ("stopped", "peak_memory_gib")  # what is kept of it
Entries = dict[tuple[str, ...], Any]  # of a record by their path, one or two names
HERE = "{study}"  # stands for the study's folder in flags


@dataclass(frozen=True)
class Lean:
    """One run.

    Args:
        record: its run.json without argv; of `result` what the lines have not.
        lines: of its metrics.jsonl those with an evaluation, and the last.
    """

    record: dict[str, Any]
    lines: list[dict[str, Any]]

    @property
    def end(self) -> dict[str, Any]:
        """The last line."""
        return self.lines[-1]


def of_run(folder: Path, study: Path) -> Lean:
    """The finished run in `folder`, of the study in the folder `study`; of a cache, its teacher and seconds."""
    if not (folder / "run.json").exists():
        header = read_json(folder / "header.json", teacher=str)
        seconds = read_json(folder / "build.json", seconds=Number)["seconds"]
        return Lean({"teacher": from_study(header["teacher"], study), "result": {}}, [{"step": 0, "train_s": seconds}])
    record, lines = folders.read_run(folder)
    record = json.loads(from_study(json.dumps(record), study))
    kept = [line for line in lines if line is lines[-1] or any("/" in name for name in line)]
    result = {name: record["result"][name] for name in OF_RESULT if name in record["result"]}
    record = {name: value for name, value in record.items() if name not in LEFT_OUT} | {"result": result}
    if "teachers" in record:
        record["teachers"] = [_teacher(teacher) for teacher in record["teachers"]]
    record["config"] = {name: value for name, value in record["config"].items() if name not in ("out", "resume")}
    return Lean(record, [{name: line[name] for name in line if name in COLUMNS or "/" in name} for line in kept])


def _teacher(told: dict[str, Any]) -> dict[str, Any]:
    """Which teacher it was and how it scored; what asking it cost is in the lines."""
    kept = {name: value for name, value in told.items() if name == "name" or "/" in name}
    return kept | {"fingerprint": folders.mark(told)}


def restore(run: Lean, folder: Path, study: Path) -> None:
    """The folder of `run` again, as far as it stands here: run.json and metrics.jsonl; of a cache, teacher and seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    if "config" not in run.record:
        header = {"teacher": run.record["teacher"].replace(HERE, str(study))}
        write_atomic(folder / "header.json", json.dumps(header) + "\n")
        write_atomic(folder / "build.json", json.dumps(sealed({"seconds": run.end["train_s"]})) + "\n")
        return
    batch = run.record["config"].get("global_batch_size")
    lines = [line | ({"samples": line["step"] * batch} if batch else {}) for line in run.lines]
    write_atomic(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    record = run.record | {"result": lines[-1] | run.record["result"], "files": folders.digests(folder)}
    folders.write_record(folder, json.loads(json.dumps(record).replace(HERE, str(study))))


def from_study(text: str, study: Path) -> str:
    """`text` with `HERE` in place of the folder `study` at the beginning of paths: it may lie elsewhere next time."""
    return re.sub(rf"(?<![\w./-]){re.escape(str(study))}(?=/)", HERE, text)


def write(folder: Path, runs: Mapping[str, Lean]) -> None:
    """runs.json and runs.csv of `folder`, in the order of `runs`."""
    flat = {name: _flat(run.record) for name, run in runs.items()}
    arms = {arm: [flat[name] for name in flat if _arm(name) == arm] for arm in map(_arm, flat) if arm}
    shared = _shared([own for of_arm in arms.values() for own in of_arm])
    of_arm = {arm: _without(_shared(own), shared) for arm, own in arms.items()}
    rest = {
        name: _without(_without(own, shared), of_arm[_arm(name)]) if _arm(name) else own for name, own in flat.items()
    }
    metrics = sorted({name for run in runs.values() for line in run.lines for name in line} - set(COLUMNS))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([*COLUMNS, *metrics])
    for name, run in runs.items():
        for line in run.lines:
            cells = [line.get(column) for column in (*COLUMNS[1:], *metrics)]
            table.writerow([name, *(f"{cell:.{DIGITS}g}" if isinstance(cell, float) else cell for cell in cells)])
    write_atomic(folder / "runs.csv", text.getvalue())  # before runs.json: what that lacks is not there
    blocks = {"all": json.dumps(_nested(shared)), "arms": _by_line(of_arm), "runs": _by_line(rest)}
    blocks["lines"] = json.dumps(_digest(_lines(text.getvalue(), runs)))
    blocks[SEAL] = json.dumps(sealed({name: json.loads(block) for name, block in blocks.items()})[SEAL])
    write_atomic(folder / "runs.json", "{" + ",\n".join(f'"{name}": {block}' for name, block in blocks.items()) + "}\n")


def read(folder: Path) -> dict[str, Lean]:
    """The runs that stand in `folder`, none where it has no such files.

    Raises:
        ValueError: one of the files is damaged, or lacks a run of the other.
    """
    if not (folder / "runs.json").exists():
        return {}
    levels = read_json(folder / "runs.json", all=dict, arms=dict, runs=dict)
    try:
        lines = _lines((folder / "runs.csv").read_text(), levels["runs"])
        shared = {arm: _flat(levels["all"]) | _flat(own) for arm, own in levels["arms"].items()} | {"": {}}
        runs = {
            name: Lean(_nested(shared[_arm(name)] | _flat(own)), lines[name]) for name, own in levels["runs"].items()
        }
        cut = [name for name, run in runs.items() if not run.lines or run.end["step"] < _length(run)]
        if cut or levels.get("lines", _digest(lines)) != _digest(lines):
            raise ValueError(
                f"runs.csv lacks lines of {cut[0]}" if cut else "runs.csv has other lines than were written"
            )
        return runs
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{folder}/runs.json and runs.csv do not fit together, or are damaged ({what})") from None


def _lines(text: str, names: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
    """The lines of runs.csv, by the run; of runs `names` alone, as it may have one more than runs.json."""
    lines: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for row in csv.DictReader(io.StringIO(text)):
        cells = {name: float(cell) for name, cell in row.items() if cell and name != "run"}
        lines.get(row["run"], []).append(cells | {"step": int(cells["step"])})
    return lines


def _digest(lines: Mapping[str, list[dict[str, Any]]]) -> str:
    return hashlib.sha256(json.dumps(lines, sort_keys=True).encode()).hexdigest()


def _length(run: Lean) -> int:
    """Steps that a run went to, as far as it is known."""
    finished = run.record["result"].get("stopped") == "finished"
    return int(run.record["config"].get("steps", 0)) if finished else 0


def _arm(name: str) -> str:
    """Whose run it is; empty for what was prepared."""
    return name.rpartition("/")[0].partition("/")[0]


def _by_line(entries: Mapping[str, Entries]) -> str:
    """JSON with one entry a line, so that a run that is added is a line of a diff."""
    return "{\n" + ",\n".join(f"{json.dumps(name)}: {json.dumps(_nested(own))}" for name, own in entries.items()) + "}"


def _flat(record: Mapping[str, Any]) -> Entries:
    """`record` with the entries of its dictionaries, which are not empty, as entries of its own; sorted."""
    flat: Entries = {}
    for name, value in record.items():
        flat |= (
            {(name, key): one for key, one in value.items()} if isinstance(value, dict) and value else {(name,): value}
        )
    return dict(sorted(flat.items()))


def _nested(flat: Entries) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        if len(path) == 1:
            nested[path[0]] = value
        else:
            nested.setdefault(path[0], {})[path[1]] = value
    return nested


def _shared(records: Sequence[Entries]) -> Entries:
    first, *others = records or [{}]
    return {
        path: value for path, value in first.items() if all(path in other and other[path] == value for other in others)
    }


def _without(record: Entries, less: Entries) -> Entries:
    return {path: value for path, value in record.items() if path not in less}
