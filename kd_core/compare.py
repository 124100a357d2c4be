"""Runs side by side: `python -m kd_core.compare RUN... [--plot FILE.png]` prints a table and draws loss against time."""

import argparse
import json
from pathlib import Path
from typing import Any

from kd_core import cli, report


def load(folder: Path) -> dict[str, Any]:
    """run.json of a run that has a result, with its folder's name.

    Raises:
        FileNotFoundError: no run there.
        ValueError: the run has not ended.
    """
    if not (folder / "run.json").exists():
        raise FileNotFoundError(f"{folder} holds no run (no run.json)")
    run = json.loads((folder / "run.json").read_text())
    if "eval/loss" not in run.get("result", {}):
        raise ValueError(f"{folder} has no result yet; continue it with --resume")
    return dict(run, folder=folder)


def table(runs: list[dict[str, Any]]) -> str:
    """A markdown table, a row a run; the teachers that the runs name come first."""
    head = ["run", "model", "steps", "validation loss", "masked accuracy", "training s", "of it teacher s"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for run in runs:
        result, config = run["result"], run["config"]
        cells = [str(run["folder"]), config["student"], str(result["step"])]
        cells += [f"{result['eval/loss']:.4f}", f"{result['eval/accuracy']:.2%}"]
        cells += [f"{result['train_s']:.1f}", f"{result['teacher_s']:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(runs: list[dict[str, Any]], file: Path) -> None:
    """Validation loss against training seconds, a curve a run, the end of its distillation window marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for run in runs:
        lines = [line for line in report.read_metrics(run["folder"]) if "eval/loss" in line]
        seconds, losses = [line["train_s"] for line in lines], [line["eval/loss"] for line in lines]
        (curve,) = axes.plot(seconds, losses, marker="o", markersize=3, label=run["folder"].name)
        inside = [line["train_s"] for line in lines if line["kd_ratio"]]
        if inside:
            axes.axvspan(0, inside[-1], color=curve.get_color(), alpha=0.1, label=f"{run['folder'].name}: window")
    axes.set(xlabel="training seconds, teacher included", ylabel="validation loss (nats per masked token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    with cli.one_line_errors():
        runs = [load(folder) for folder in args.runs]
        named = dict.fromkeys(
            teacher for run in runs if run["config"]["kd_ratio"] for teacher in run["config"]["teachers"]
        )
        trained_here = [load(Path(teacher)) for teacher in named if (Path(teacher) / "run.json").exists()]
        print(table(trained_here + runs))
        if args.plot:
            plot(runs, args.plot)
            print(f"plot: {args.plot}")


if __name__ == "__main__":
    main()
