"""The command line on quantised weights without a GPU: bitsandbytes computes on CPUs, which users are not offered."""

from bitsandbytes.nn import modules

from dpo_ds.commands import cli, preflight


def main(*argv: str) -> int:
    preflight.check_quantize = lambda section, machine: None
    modules.has_avx512bf16 = lambda: False  # else it repacks weights in place, for inference on such CPUs
    return cli.main(list(argv))
