"""What holds for every recipe, by its header: the smoke command runs; killed with -9 on two ranks it resumes exactly."""

import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import warm
from tests.conftest import ROOT, cpu_environment
from tests.recipes.headers import command, header

# GLUE's starts from a pretrained run: tests/recipes/test_glue.py.
RECIPES = sorted(
    path
    for path in (ROOT / "recipes").rglob("[a-z]*.py")
    if "results" not in path.parts and path != ROOT / "recipes" / "glue.py"
)
# What recipes may be that none is yet: a chain of stages, one without a network.
TOYS = [ROOT / "tests" / "recipes" / "toys" / name for name in ("stages.py", "search.py")]
TIMES = {"train_s", "teacher_s", "data_s"}
# What makes a smoke run long enough to be killed inside, of a recipe without a line `Kill:`.
KILL = "--steps 8 --save-every 3 --eval-every 4 --log-every 1"
Smoke = Callable[[Path], list[str]]


def has_stages(recipe: Path) -> bool:
    return "chain.run(" in recipe.read_text()


def slow_if_chain(recipe: Path) -> Any:
    """A chain's stages are processes that import everything themselves."""
    return pytest.param(recipe, marks=pytest.mark.slow) if has_stages(recipe) else recipe


def begin(words: list[str], ranks: int, folder: Path, *, chain: bool = False) -> list[warm.Popen]:
    """The ranks of a run; a chain starts the ranks of its stages itself."""
    own = {"PYTHONPATH": str(ROOT)}
    if not chain:
        return warm.begin(ranks, words[1:], folder, **own)
    with (folder / "0.log").open("a") as log:
        return [warm.Popen(words, cwd=folder, env=cpu_environment(**own, NUM_GPUS=str(ranks)), stderr=log)]


def run(words: list[str], ranks: int, folder: Path, *, chain: bool = False) -> None:
    codes = [process.wait(240) for process in begin(words, ranks, folder, chain=chain)]
    assert set(codes) == {0}, (folder / "0.log").read_text()[-3000:]


def stages(folder: Path) -> list[Path]:
    """The run folder itself, or those of a chain's stages in the order in which they began."""
    found = [file.parent for file in folder.glob("*/run.json")]
    return sorted(found, key=lambda stage: stage.with_suffix(".log").stat().st_ctime_ns) or [folder]


def result(folder: Path) -> dict[str, Any]:
    """Empty while the run goes on."""
    return json.loads((folder / "run.json").read_text()).get("result", {})


def lines(folder: Path) -> list[dict[str, Any]]:
    file = folder / "metrics.jsonl"
    complete = file.read_text().split("\n")[:-1] if file.exists() else []
    return [{name: value for name, value in json.loads(line).items() if name not in TIMES} for line in complete]


def exported(folder: Path) -> dict[str, bytes]:
    """What a run has made besides its records: hf/, or what its field's own library loads."""
    records = ("run.json", "metrics.jsonl", "tensorboard", "checkpoints")
    files = (path for path in folder.rglob("*") if path.is_file() and path.relative_to(folder).parts[0] not in records)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Smoke:
    """A recipe's smoke command, its teacher trained if it names one; a teacher of the same command is trained once."""
    teachers: dict[str, str] = {}

    def words(recipe: Path) -> list[str]:
        told = header(recipe)
        own = command(told["Smoke"])
        assert Path(own[1]) == recipe, f"{recipe}: its smoke command runs {own[1]}"
        if line := told.get("Teacher"):
            if not line.startswith("python "):  # flags that are added to its own
                without = told["Smoke"].replace("--teachers {teacher}", "")
                line = f"{without} {line}"
            if line not in teachers:
                folder = tmp_path_factory.mktemp("teacher")
                run([*command(line), "--out", "run"], 1, folder)
                teachers[line] = str(folder / "run")
            own = [word.replace("{teacher}", teachers[line]) for word in own]
        return own

    return words


@pytest.mark.parametrize("recipe", [*map(slow_if_chain, RECIPES), *TOYS], ids=lambda path: path.stem)
def test_the_smoke_command_of_the_header_runs(recipe: Path, smoke: Smoke, tmp_path: Path) -> None:
    run(smoke(recipe), 1, tmp_path, chain=has_stages(recipe))
    (folder,) = (tmp_path / "runs" / recipe.stem).iterdir()
    assert len(stages(folder)) > 1 or not has_stages(recipe)
    for stage in stages(folder):
        assert result(stage)["stopped"] == "finished"
        assert not [name for name, value in result(stage).items() if value is None], "a value that is not finite"
    assert exported(folder) or recipe in TOYS


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_full_size_networks_of_the_command_can_be_built(recipe: Path, tmp_path: Path) -> None:
    """On the meta device, so that the real command cannot rot; -s shows parameters and memory."""
    script = [sys.executable, str(ROOT / "tests/recipes/on_meta.py"), str(recipe)]
    env = cpu_environment(PYTHONPATH=str(ROOT))
    done = warm.run(script, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    print(recipe.stem, json.dumps(told, indent=1))
    sizes = {one["name"]: one["parameters"] for one in [*told["trained"], *told["teachers"]]}
    assert sizes, "its command builds no network"
    published = {
        "bert_kd": {"student": 110e6, "google-bert/bert-large-uncased": 335e6},
        "dkd": {"student": 11.7e6, "resnet34": 21.8e6},
        "bd_kd": {"student": 11.7e6, "teacher": 21.8e6},
        "born_again": {"student": 25.6e6},
        "mix_kd": {"student": 11.7e6, "resnet34": 21.8e6},
        "lelp": {"student": 13.2e6, "resnet50": 25.6e6},
        "meal_v2": {"student": 25.6e6, "resnet152": 60.2e6, "wide_resnet101_2": 126.9e6},
        "pld": {"student": 11.7e6, "resnet152": 60.2e6},
        "ssld": {"student": 11.7e6, "resnet152": 60.2e6},
        "tgeo_kd": {"student": 11.7e6, "ratio": 288_577, "resnet34": 21.8e6},
    }
    published["causal_lm_kd"] = {
        "student": 134.5e6, "HuggingFaceTB/SmolLM2-360M": 361.8e6, "HuggingFaceTB/SmolLM2-1.7B": 1711e6
    }  # fmt: skip
    published |= {"resnet_kd": {"student": 25.6e6, "resnet101": 44.5e6}}
    assert sizes == pytest.approx(published.get(recipe.stem, sizes), rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [*RECIPES, *TOYS], ids=lambda path: path.stem)
def test_kill_9_on_two_ranks_then_resume_gives_the_same_lines_and_bytes(
    recipe: Path, smoke: Smoke, tmp_path: Path
) -> None:
    """A chain is killed in each of its stages, and goes on by the same call."""
    chain = has_stages(recipe)
    words = [*smoke(recipe), *shlex.split(header(recipe).get("Kill", KILL))]
    run([*words, "--out", "whole"], 2, tmp_path, chain=chain)
    whole = stages(tmp_path / "whole")
    words += ["--out", "killed"]
    for stage in whole:
        other = tmp_path / "killed" / stage.relative_to(tmp_path / "whole")
        killed = begin(words, 2, tmp_path, chain=chain)
        deadline = time.monotonic() + 240
        while len(lines(other)) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        warm.kill(killed)
        assert not result(other), f"{other} ended before it was killed"
    run(words if chain else [*words, "--resume"], 2, tmp_path, chain=chain)
    for stage in whole:
        other = tmp_path / "killed" / stage.relative_to(tmp_path / "whole")
        named = json.dumps(lines(other)).replace("killed/", "whole/")  # a stage's teacher is a stage
        assert json.loads(named) == lines(stage)
        assert exported(other) == exported(stage)
