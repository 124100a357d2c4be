#!/usr/bin/env bash
# Set up once, then run a command in that environment:
#
#     bash launch/env.sh                       set up
#     bash launch/env.sh python3 -m pytest     set up if need be, then run
#
# The python3 on PATH (an active venv or conda environment, a container's own) is used when every dependency of
# pyproject.toml is there, in its lower bound, and imports. Otherwise they are installed into .venv at the root of the
# repository. KD_DEV=1 asks for the test tools as well. Needs bash, coreutils and Python 3.11 or newer; an interrupted
# set-up is completed by the next call.
set -euo pipefail
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
cache=$root/launch/__pycache__ # ignored by git, may be deleted at any time

say() { echo "launch/env.sh: $*" >&2; }
die() { say "$@"; exit 1; }
is_recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# Prints the folder of a suitable Python's programs. For any other prints the reason and returns 1. Comparing versions
# takes 0.1 s; importing takes seconds, so its verdict is kept in a file that the versions name.
check() {
    is_recent "$1" || { echo "no Python 3.11 or newer"; return 1; }
    "$1" -P - "$root" "${KD_DEV:-}" <<'PYTHON'
import fcntl
import hashlib
import importlib.util
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

root, dev = Path(sys.argv[1]), sys.argv[2]
in_venv = Path(sys.prefix).resolve() == root / ".venv"
settings = (root / "pyproject.toml").read_text()
project = tomllib.loads(settings)["project"]


def no(reason):
    print(reason)
    sys.exit(1)


def numbers(version):
    return [int(number) for number in re.match(r"\d+(\.\d+)*", version)[0].split(".")]


names, identity = [], [sys.executable, sys.version, settings]
for requirement in project["dependencies"] + (project["optional-dependencies"]["dev"] if dev else []):
    name, bound = requirement.split(">=")
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        no(f"{name} is not installed")
    if not version or numbers(version) < numbers(bound):
        no(f"{name} is {version}, needed is {bound}")
    names.append({"scikit-learn": "sklearn", "pytest-xdist": "xdist"}.get(name, name))
    identity.append(version)
installed = importlib.util.find_spec("kd_core") is not None
if in_venv and not installed:
    no("the project itself is not installed")

verdict = root / (".venv" if in_venv else "launch/__pycache__") / (
    "checked-" + hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
)
reason = verdict.read_text() if verdict.exists() else None
if reason is None or (reason and not (root / ".venv").exists()):  # removing .venv has a bad one examined again
    try:
        fcntl.flock(9, fcntl.LOCK_EX)
    except OSError as error:
        print(f"launch/env.sh: no lock ({error.strerror}): start nothing else during the set-up", file=sys.stderr)
    print(f"launch/env.sh: importing {', '.join(names)} from {sys.prefix} (once, about 10 s)", file=sys.stderr)
    imports = subprocess.run([sys.executable, "-P", "-c", f"import {', '.join(names)}"], capture_output=True, text=True)
    reason = (imports.stderr.strip().splitlines() or ["import failed"])[-1] if imports.returncode else ""
    if not reason and not installed:  # so that `deepspeed launch/bert_kd.sh` works here as well
        print(f"launch/env.sh: installing the project itself into {sys.prefix} (editable, seconds)", file=sys.stderr)
        pip = [sys.executable, "-m", "pip", "install", "--no-deps", "-e", str(root)]
        for option in ("--no-build-isolation", "--no-input"):  # with the setuptools there, or a newer one downloaded
            if subprocess.run([*pip, option], stdin=subprocess.DEVNULL, capture_output=True).returncode == 0:
                break
        else:
            print(f"launch/env.sh: not possible there: for `deepspeed` itself, export PYTHONPATH={root}", file=sys.stderr)
    if not (reason and in_venv):  # what is wrong with .venv is repaired, not remembered
        try:
            verdict.write_text(reason)
        except OSError:
            pass  # a read-only clone is checked anew each time
if reason:
    no(reason)
print(Path(sys.executable).parent)
PYTHON
}

# The newest Python that torch has wheels for and that can make environments. A name on PATH may be an empty shim.
find_python() {
    local python found=
    for python in python3.14 python3.13 python3.12 python3.11 python3; do
        is_recent "$python" || continue
        found=$python
        "$python" -c 'import venv, ensurepip' 2>/dev/null && { command -v "$python"; return; }
    done
    [ -z "$found" ] || die "$found has no venv module (on Debian or Ubuntu: apt install $found-venv)"
    die "Python 3.11 or newer is needed (on Debian or Ubuntu: apt install python3 python3-venv; else python.org)"
}

make_venv() {
    local python=$1 file extra=${KD_DEV:+[dev]}
    # pip's INSTALLER file is written last: without it, the interpreter or pip itself is half there.
    if ! { is_recent "$venv/bin/python3" && compgen -G "$venv/lib/python3*/site-packages/pip-*/INSTALLER" >/dev/null; }; then
        rm -rf "$venv"
        say "making .venv with $("$python" -V) ($python; seconds)"
        "$python" -m venv "$venv" || die "$python could not make .venv (disk full, or apt install python3-venv?)"
    fi
    for file in "$venv"/lib/python3*/site-packages/*.dist-info; do
        [ -e "$file/INSTALLER" ] || rm -rf "$file" # an interrupted installation, else taken for a complete one
    done
    say "installing dependencies into .venv (first time: 3 GB to download, 7 GB on disk, mostly torch; several minutes)"
    # One command, so that torch and torchvision are chosen together. Its temporary files may not fit into /tmp.
    rm -rf "$venv/tmp"
    mkdir "$venv/tmp"
    TMPDIR=$venv/tmp "$venv/bin/python3" -m pip install -e "$root$extra" >&2 </dev/null ||
        die "pip failed, see above: check network and disk, then call again (finished downloads are kept)"
    rm -rf "$venv/tmp"
}

# DeepSpeed's automatic choice works without a GPU too, but every process says so.
if [ "${CUDA_VISIBLE_DEVICES-unset}" = "" ] || ! compgen -G '/dev/nvidia[0-9]*' >/dev/null; then
    [ -e /dev/dxg ] || [ -e /dev/kfd ] || export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
fi

# torchao, where it is installed, has every process warn of its own use of torch.
export TORCH_LOGS=${TORCH_LOGS:--torch.utils._pytree}

# Descriptor 9 is the lock against two set-ups at once; check() and the line below take it, the end of the set-up,
# even by kill -9, frees it. (The flock program is not everywhere.)
lock=/dev/null
mkdir -p "$cache" 2>/dev/null && [ -w "$cache" ] && lock=$cache/env.lock
exec 9>"$lock"
if ! bin=$(check python3); then
    why=$bin
    if ! bin=$(check "$venv/bin/python3"); then
        say "python3 on PATH will not do ($why): using .venv"
        python=$(find_python)
        "$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)' 2>/dev/null || say "no lock: start nothing else meanwhile"
        if ! bin=$(check "$venv/bin/python3"); then make_venv "$python"; fi # another call may have made it meanwhile
        bin=$(check "$venv/bin/python3") || die ".venv does not work ($bin): remove it and call again"
        say "set up in $venv"
    fi
    export VIRTUAL_ENV=$venv
    unset PYTHONHOME
fi
exec 9>&-

export PATH=$bin:$PATH
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} # this clone, even where another one is installed
[ $# = 0 ] || exec "$@"
