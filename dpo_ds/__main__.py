"""`python -m dpo_ds`, which the deepspeed launcher, torchrun and srun start."""

import sys

from dpo_ds.commands.cli import main

sys.exit(main())
