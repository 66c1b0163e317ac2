"""`python -m dpo_ds`, which the deepspeed launcher, torchrun and srun start, and the script `dpo-ds`."""

import atexit
import os
import traceback
from typing import NoReturn

from dpo_ds.cluster import signals, terminal


def program() -> NoReturn:
    """Runs the command line in a process of its own; the first thing it does is to take signals."""
    signals.take()
    terminal.protect()
    try:
        from dpo_ds.commands.cli import main

        code = main()
    except signals.Stopped as stopped:  # while `main` was imported
        code = signals.EXIT_STOPPED
        if os.environ.get("RANK", "0") == "0":
            print(f"dpo-ds: {stopped.line()}", flush=True)
    except SystemExit as leaving:  # --help, --version
        code = leaving.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    end(code)


def end(code: int) -> NoReturn:
    """Ends the process in order: what Python has registered for its end, what is still to be printed, and no more.

    The interpreter itself is not taken down. A thread in a call of torch's C++ (a TCPStore's, say) that wants the
    interpreter's lock back meanwhile is ended by pthread_exit, through C++ frames that must not be unwound: "terminate
    called without an active exception", SIGABRT (exit code 250 over ssh), after a run that was fine. We keep no such
    thread, the watch over the ranks has sockets of its own; but DeepSpeed keeps process groups that were destroyed, and
    their threads (pt_gloo_runloop), and a user's scoring function may keep any.
    """
    signals.ignore()
    atexit._run_exitfuncs()  # it has no public name
    terminal.finish()
    os._exit(code)


if __name__ == "__main__":
    program()
