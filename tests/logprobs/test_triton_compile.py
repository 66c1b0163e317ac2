"""The Triton kernels compile for Hopper; no GPU is needed. A process of its own: the interpreter is off there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCALARS = {"N": "i32", "V": "i32", "D": "i32", "splits": "i32", "scale": "fp32", "softcap": "fp32"}
POINTERS = dict.fromkeys(
    ["bias", "hidden", "weight", "d_logits"], "*bf16"
) | {"targets": "*i64"} | dict.fromkeys(
    ["partials", "target_logits", "lse", "grad", "logps", "entropies", "hits", "log_sum_p2s"], "*fp32"
)  # fmt: skip


def test_kernels_compile_without_a_gpu():
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["_fold_kernel", "wgmma", "_logit_gradient_kernel", "wgmma", "_combine_kernel"]


def compiled(kernel, capability, launch, constants):
    """Assembly of `kernel`; whatever is neither pointer nor scalar nor given is a constant of None."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = POINTERS | SCALARS
    signature = {n: types.get(n, "constexpr") if n not in constants else "constexpr" for n in kernel.arg_names}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(n),): v for n, v in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if signature[n][0] == "*"},
    )
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]


def main():
    from dpo_ds.logprobs import triton as backend

    launch = backend.LAUNCHES[9, torch.bfloat16.itemsize]
    tile = backend.TritonKernel(1.0, 1.0, launch)._constants(4096, True, compiled=True)
    tile = {k: v for k, v in tile.items() if k.isupper()}
    for kernel, constants in (
        # One split: Triton makes an argument of 1 a constant.
        (backend._fold_kernel, tile | {"splits": 1, "STATISTICS": True, "SPLIT": backend.SPLIT_COLUMNS}),
        (backend._logit_gradient_kernel, tile),
        (backend._combine_kernel, {"splits": 1, "STATISTICS": True, "ROWS": 128}),
    ):
        ptx = compiled(kernel, 90, launch, constants)
        print(kernel.__name__, "wgmma" if "wgmma.mma_async" in ptx else "")


if __name__ == "__main__":
    main()
