"""The command line on quantised weights without a GPU: bitsandbytes computes on CPUs, which users are not offered."""

from dpo_ds.commands import cli, precompute, preflight


def main(*argv: str) -> int:
    preflight.check_quantize = precompute.check_quantize = lambda *_: None
    return cli.main(list(argv))
