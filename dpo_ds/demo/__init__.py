"""The demo: a corpus with a known rule, a tiny model, and the real commands run on them. `python -m dpo_ds.demo`."""
