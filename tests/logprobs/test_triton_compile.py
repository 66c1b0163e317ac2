"""The Triton kernels compile for Ampere, Hopper and Blackwell; no GPU is needed. A process of its own: the interpreter
is off there. `python tests/logprobs/test_triton_compile.py` prints the table."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

FEATURES = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "bulk copies": "cp.async.bulk.tensor"}
SCALARS = ["N", "V", "D", "splits", "kept_columns", "kept_stride", "stride", "tops_stride"]
FLOATS = ["partials", "target_logits", "kept_tops", "lse", "grad", "logps", "entropies", "hits", "log_sum_p2s"]
SIXTEENFOLD = ["D", "kept_stride", "stride"]  # Triton knows an argument's being a multiple of 16
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes that a block can have


@pytest.fixture(scope="module")
def table():
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.timeout(600)
def test_kernels_compile_without_a_gpu(table):
    """Hopper's and Blackwell's matmul instructions and bulk copies in the matmul kernels, and nothing spilled but, on
    Blackwell, some registers between two tiles."""
    assert len(table) == 3 * 4 + 1 + 2
    for row in table:
        capability, matmul = row["sm"], row["kernel"] in ("fold_kernel", "logit_gradient_kernel")
        assert row["spilled bytes"] <= (64 if capability == 100 else 0), row
        assert row["shared bytes"] <= SHARED_MEMORY[capability], row
        features = {80: [], 90: ["wgmma"], 100: ["tcgen05"]}[capability] + ["bulk copies"] * row["descriptors"]
        assert row["features"] == (features if matmul else []), row
    assert [row["descriptors"] for row in table] == [False] * 4 + [True] * 8 + [False] * 3


def test_every_fold_of_one_architecture_adds_in_the_same_order(table):
    """A token's log-prob has the same bits with statistics, with exponentials kept and, on Hopper, by pointers."""
    for capability, kinds in ((80, 3), (90, 4), (100, 3)):
        folds = [row["sums"] for row in table if row["sm"] == capability and row["kernel"] == "fold_kernel"]
        assert len(folds) == kinds and folds[0] and all(sums == folds[0] for sums in folds), folds


def compiled(kernel, capability, launch, constants) -> dict:
    """What became of `kernel`; whatever is neither tensor nor number nor given is a constant of None."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dpo_ds.logprobs import triton as backend

    types = {"targets": "*i64", "scale": "fp32", "softcap": "fp32"} | dict.fromkeys(SCALARS, "i32")
    types |= dict.fromkeys(FLOATS, "*fp32") | dict.fromkeys(["hidden", "weight", "kept", "d_logits"], "*bf16")
    if constants.get("DESCRIPTORS"):
        rows, columns, depth = launch.rows, launch.columns, launch.depth
        types["hidden"], types["weight"] = f"tensordesc<bf16[{rows}, {depth}]>", f"tensordesc<bf16[{columns}, {depth}]>"
        types["kept"] = types["d_logits"] = f"tensordesc<bf16[{rows}, {columns}]>"
    signature = {n: "constexpr" if n in constants else types.get(n, "constexpr") for n in kernel.arg_names}
    multiples = {n for n, kind in signature.items() if kind[0] == "*"} | ({*SIXTEENFOLD} - {*constants})
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(i,): constants.get(n) for i, n in enumerate(kernel.arg_names) if signature[n] == "constexpr"},
        attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if n in multiples},
    )
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=backend.options(launch))
    ptx = built.asm["ptx"]
    return {
        "sm": capability,
        "kernel": kernel.__name__,
        "descriptors": constants.get("DESCRIPTORS", False),
        "with": [n for n in ("KEEP", "STATISTICS") if constants.get(n)],
        "spilled bytes": _spilled(ptx, capability),
        "shared bytes": built.metadata.shared,
        "features": [name for name, instruction in FEATURES.items() if instruction in ptx],
        "sums": _layouts_of_sums(built.asm["ttgir"]),
    }


def _layouts_of_sums(ir: str) -> list[str]:
    """How tiles that are summed by rows lie in registers: it orders the sums."""
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", ir, re.MULTILINE))
    return sorted({layouts[name] for name in re.findall(r"\}\) : \(tensor<\d+x\d+xf32, (#\w+)>\) ->", ir)})


def _spilled(ptx: str, capability: int) -> int:
    from triton import knobs

    tool = knobs.nvidia.ptxas_blackwell if capability >= 100 else knobs.nvidia.ptxas
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE).group(1)
    command = [tool.path, "-v", f"--gpu-name={target}", "-o", "/dev/null", "-"]
    done = subprocess.run(command, input=ptx, capture_output=True, text=True)
    stores, loads = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr).groups()
    return max(int(stores), int(loads))


def main():
    from dpo_ds.logprobs import kernels
    from dpo_ds.logprobs import triton as backend

    size = torch.bfloat16.itemsize
    for capability in (80, 90, 100):
        launches = backend.LAUNCHES[capability // 10, size]
        for fold in ({"STATISTICS": True}, {"KEEP": True}, {"KEEP": True, "STATISTICS": True}):
            constants = {"KEEP": False, "STATISTICS": False} | fold
            constants |= {} if constants["KEEP"] else {"kept": None, "kept_tops": None}
            print(json.dumps(compiled_with(kernels.fold_kernel, capability, launches.fold, constants)), flush=True)
        print(json.dumps(compiled_with(kernels.logit_gradient_kernel, capability, launches.gradient, {})), flush=True)
    pointers = replace(backend.LAUNCHES[9, size].fold, descriptors=False)
    constants = {"KEEP": False, "STATISTICS": False, "kept": None, "kept_tops": None}
    print(json.dumps(compiled_with(kernels.fold_kernel, 90, pointers, constants)), flush=True)
    small = backend.Launch(32, 256, 0, 4, 3)
    print(json.dumps(compiled(kernels.kept_gradient_kernel, 90, small, {"ROWS": 32, "COLUMNS": 256})))
    print(json.dumps(compiled(kernels.combine_kernel, 90, small, {"STATISTICS": True, "ROWS": 128})))


def compiled_with(kernel, capability, launch, constants) -> dict:
    """`compiled` with the constants that the backend gives for a head of 131072 x 4096, no bias, scale or soft-cap."""
    from dpo_ds.logprobs import triton as backend

    fixed = backend.constants(launch, (131072, 4096), launch.descriptors)
    return compiled(kernel, capability, launch, fixed | constants)


if __name__ == "__main__":
    main()
