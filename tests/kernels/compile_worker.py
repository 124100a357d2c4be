"""Compiles Triton's kernels for several GPUs, a JSON line for each: python -m tests.kernels.compile_worker few|every."""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kd_core.kernels import softmax_kl_triton as kernels

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
FLAGS: dict[str, Any] = {
    "TEACHER": True, "LABELS": True, "DIRECTION": "forward", "TAU": 1, "STUDENT_TAUS": False, "TEACHER_TAUS": False,
    "MIX": False, "MIXES": False, "ALIGN": 8, "WEIGHTS": False, "KD": True, "LABEL": True, "SUMS": True, "MIXTURE": False,
}  # fmt: skip
# TAU and DIRECTION: what takes few registers, and most.
RESIDENT = ((1, "forward"), (1, "reverse"), (8, "forward"), (0, "reverse"))
JS = {"DIRECTION": "js", "MIX": True, "MIXTURE": True}
OF_JS = (4096, 30522)  # vocabularies: a kernel of each kind
DTYPES = ("bf16", "fp32")
EVERY = {"sm_80": DTYPES, "sm_90": DTYPES, "gfx942": DTYPES}, (1000, 4096, 16383, 30522, 32000, 50257, 128256, 151936)
# Every branch of every kernel: further vocabularies above 16384 differ in how often a loop turns, dtypes in its width.
FEW = {"sm_80": ("fp32",), "sm_90": ("bf16",), "gfx942": ("bf16",)}, (1000, 4096, 16383, 30522)
FLOATS = ("student_tau", "teacher_tau", "kd_weight", "label_weight", "row_weight", "mix", "beta", "rest")
INTEGERS = ("N", "size", "ignore_index")


def argument(name: str, dtype: str) -> str:
    if name in ("student", "teacher", "grad"):
        return "*" + dtype
    if name in FLOATS:
        return "fp32"
    if name in INTEGERS or name.endswith("_stride"):
        return "i32"
    return "*i64" if name == "labels" else "*fp32"


def source(kernel: Any, dtype: str, flags: dict[str, Any]) -> ASTSource:
    names = kernel.arg_names
    signature = {name: "constexpr" if name in flags else argument(name, dtype) for name in names}
    constants = {(index,): flags[name] for index, name in enumerate(names) if name in flags}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if name in ("student", "teacher", "grad")
    }
    return ASTSource(kernel, signature, constants, aligned)


def disassemble(cubin: bytes) -> dict[str, int]:
    """Registers, bytes of stack, and counts of instructions of a compiled kernel, by the tools that Triton carries."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    instructions = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([^;]+);", code, re.M)
    ranges = loops([(int(place, 16), text) for place, text in instructions])
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "instructions": sum(not text.startswith("NOP") for _, text in instructions),
        "exponentials": sum(text.startswith("MUFU.EX2") for _, text in instructions),
        "loads_128": sum(re.match(r"LDG\S*\.128", text) is not None for _, text in instructions),
        "stores_128": sum(re.match(r"STG\S*\.128", text) is not None for _, text in instructions),
        "loops": len(ranges),
        "barriers_in_loops": sum(
            text.startswith("BAR") and any(first <= int(place, 16) <= last for first, last in ranges)
            for place, text in instructions
        ),
    }


def loops(instructions: list[tuple[int, str]]) -> list[tuple[int, int]]:
    """First and last place of each backward branch's range; the endless one after a kernel's exit is none."""
    branches = ((place, re.search(r"^BRA\S* .*?0x([0-9a-f]+)", text)) for place, text in instructions)
    return [(int(to[1], 16), place) for place, to in branches if to and int(to[1], 16) < place]


def report(
    kernel: Any, columns: int, dtype: str, flags: dict[str, Any], target: str, warps: int, blocks: int = 1
) -> None:
    options = {"num_warps": warps, "num_ctas": blocks}
    done = triton.compile(source(kernel, dtype, FLAGS | flags), target=TARGETS[target], options=options)
    row = {
        "kernel": kernel.__name__,
        "columns": columns,
        "dtype": dtype,
        "target": target,
        "cluster": blocks > 1,
        "tau": flags.get("TAU", 1),
        "direction": flags.get("DIRECTION", "forward"),
    }
    print(json.dumps(row | (disassemble(done.asm["cubin"]) if "cubin" in done.asm else {})), flush=True)


def main() -> None:
    dtypes, vocabularies = {"few": FEW, "every": EVERY}[sys.argv[1]]
    for target in TARGETS:
        for dtype in dtypes[target]:
            # Other GPUs need to compile, no more: one resident and one streaming kernel.
            for columns in vocabularies if target.startswith("sm_") else (1000, 30522):
                flags = {"V": columns, "PEEL": columns % 8 != 0}
                plan, width = kernels.plan(columns), {"bf16": 8, "fp32": 4}[dtype]
                gradient = flags | {"BLOCK": kernels.GRADIENT_BLOCK}
                report(kernels._gradient_kernel, columns, dtype, gradient, target, kernels.GRADIENT_WARPS)
                if plan.rows == 0:
                    for tau in (1, 2, 0):
                        streaming = flags | {"LANES": plan.block, "WIDTH": width, "TAU": tau}
                        report(kernels._streaming_kernel, columns, dtype, streaming, target, plan.warps)
                else:
                    for tau, direction in RESIDENT if columns > 1000 else RESIDENT[:1]:
                        own = kernels.plan(columns, second_exponential=tau == 0)
                        if own.rows == 0:
                            continue
                        resident = {"ROWS": own.rows, "BLOCK": own.block, "TAIL": 0, "GRADIENT": True}
                        resident |= {"TAU": tau, "DIRECTION": direction}
                        report(kernels._resident_kernel, columns, dtype, flags | resident, target, own.warps)
                if columns in OF_JS:
                    own = kernels.plan(columns, js=True)
                    if own.rows == 0:
                        report(kernels._gradient_kernel, columns, dtype, gradient | JS, target, kernels.GRADIENT_WARPS)
                        streaming = flags | JS | {"LANES": own.block, "WIDTH": width, "TAU": 2}
                        report(kernels._streaming_kernel, columns, dtype, streaming, target, own.warps)
                    else:
                        resident = {"ROWS": own.rows, "BLOCK": own.block, "TAIL": 0, "GRADIENT": True, "TAU": 0}
                        report(kernels._resident_kernel, columns, dtype, flags | resident | JS, target, own.warps)
                if plan.rows == 0 and target == "sm_90" and kernels.clusters_compile():
                    plan = kernels.cluster_plan(columns)
                    resident = {"ROWS": 1, "BLOCK": plan.block, "TAIL": plan.tail, "GRADIENT": True}
                    for extra in ({}, JS) if columns in OF_JS else ({},):
                        settings = flags | resident | extra
                        report(kernels._resident_kernel, columns, dtype, settings, target, plan.warps, plan.blocks)
            report(kernels._total_kernel, 0, dtype, {"BLOCK": kernels.TOTAL_BLOCK}, target, 4)
            scale = {"PROGRAMS": kernels.SCALE_PROGRAMS, "BLOCK": kernels.SCALE_BLOCK}
            report(kernels._scale_kernel, 0, dtype, scale, target, 8)


if __name__ == "__main__":
    main()
