"""`python -m dpo_ds.memory run.yaml --ranks 8`."""

from dpo_ds.memory.allocations import main

main()
