"""Knows what accelerate's trackers have no common word for: by what a run is found again, and where text is shown.

A service's own package is imported inside these functions, in the tracker's process (trackers/__main__.py) alone. Where
a service is told its server, its account and all else: in its own environment variables and files.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from dpo_ds.training.output_dir import SAMPLES

FOLDER = "trackers"  # in output_dir: what each keeps and prints, and its own id of the run
COLUMNS = ["prompt", "completion"]


class Run(NamedTuple):
    """Names a run: in which project, the folder it writes into, and, where it goes on, the service's own id of it."""

    project: str
    name: str
    folder: Path
    id: str | None

    @property
    def own(self) -> str:
        """Where trackers keep what they have."""
        return str(self.folder / FOLDER)


class Service(NamedTuple):
    """Starts a run's tracker, knows it again, shows its completions.

    options(run): keyword arguments of accelerate's class. Of the service's own object: identity(own), what finds the
    run again; address(own), where it is looked at, None where nobody says; begin(own, run), what is left to do once it
    has started. show(tracker, step, rows, run): rows of a prompt and a completion; None: the service shows no text.
    fail(tracker): ends a run that has failed. repeats: whether a step may come again, as it does after a resumption;
    else the step is a metric of its own.
    """

    options: Callable[[Run], dict[str, Any]]
    identity: Callable[[Any], str]
    address: Callable[[Any], str | None] = lambda own: None
    begin: Callable[[Any, Run], None] = lambda own, run: None
    show: Callable[[GeneralTracker, int, list[list[str]], Run], None] | None = None
    fail: Callable[[GeneralTracker], None] = lambda tracker: tracker.finish()
    repeats: bool = True


def start(name: str, run: Run) -> GeneralTracker:
    """Returns accelerate's tracker of this name at work, on a new run or on the one that `run.id` says."""
    service = SERVICES[name]
    tracker = LOGGER_TYPE_TO_CLASS[CLASSES.get(name, name)](run.project, **service.options(run))
    tracker.main_process_only = False  # there is one process, and nobody is to look for others
    tracker.start()
    service.begin(tracker.tracker, run)
    return tracker


def _show_table(tracker: GeneralTracker, step: int, rows: list[list[str]], run: Run) -> None:
    tracker.log_table("samples", columns=COLUMNS, data=rows, step=step)


def _show_wandb(tracker: GeneralTracker, step: int, rows: list[list[str]], run: Run) -> None:
    tracker.log_table("samples", columns=["step", *COLUMNS], data=[[step, *row] for row in rows])


def _show_mlflow(tracker: GeneralTracker, step: int, rows: list[list[str]], run: Run) -> None:
    tracker.log_artifact(str(run.folder / SAMPLES))


def _show_trackio(tracker: GeneralTracker, step: int, rows: list[list[str]], run: Run) -> None:
    import trackio

    tracker.log({"samples": trackio.Table(columns=COLUMNS, data=rows)}, step=step)


def _show_comet(tracker: GeneralTracker, step: int, rows: list[list[str]], run: Run) -> None:
    for prompt, completion in rows:
        tracker.tracker.log_text(completion, step=step, metadata={"prompt": prompt})


def _show_aim(tracker: GeneralTracker, step: int, rows: list[list[str]], run: Run) -> None:
    import aim

    tracker.log({f"samples/{i}": aim.Text("\n\n".join(row)) for i, row in enumerate(rows)}, step=step)


def _show_swanlab(tracker: GeneralTracker, step: int, rows: list[list[str]], run: Run) -> None:
    import swanlab

    tracker.log({"samples": [swanlab.Text("\n\n".join(row)) for row in rows]}, step=step)


def _mlflow_address(own) -> str | None:
    import mlflow

    server = urlsplit(mlflow.get_tracking_uri())
    if not server.scheme.startswith("http"):
        return None
    host = server.netloc.rpartition("@")[2]  # without the password that may stand before it
    return f"{server.scheme}://{host}{server.path}/#/experiments/{own.info.experiment_id}/runs/{own.info.run_id}"


def _fail_mlflow(tracker: GeneralTracker) -> None:
    import mlflow

    mlflow.end_run("FAILED")


def _begin_wandb(own, run: Run) -> None:
    own.define_metric("step")
    own.define_metric("*", step_metric="step")


def _begin_comet(own, run: Run) -> None:
    if run.id is None:
        own.set_name(run.name)


def _begin_aim(own, run: Run) -> None:
    own.name = run.name  # accelerate has put the project there


def _clearml_options(run: Run) -> dict[str, Any]:
    again = {"reuse_last_task_id": run.id, "continue_last_task": 0}  # 0: steps are counted as before
    return {"task_name": run.name, **(again if run.id else {"reuse_last_task_id": False})}


def _swanlab_options(run: Run) -> dict[str, Any]:
    again = {"id": run.id, "resume": "must"} if run.id else {}
    return {"name": run.name, "log_dir": f"{run.own}/swanlog", **again}


CLASSES = {"comet": "comet_ml"}  # where accelerate calls it otherwise
SERVICES: dict[str, Service] = {
    "wandb": Service(
        lambda run: {"name": run.name, "dir": run.own, "id": run.id, "resume": "allow" if run.id else None},
        lambda own: own.id, lambda own: own.url, _begin_wandb, _show_wandb,
        lambda tracker: tracker.tracker.finish(exit_code=1), repeats=False,
    ),
    "mlflow": Service(
        lambda run: {"run_name": run.name, "run_id": run.id}, lambda own: own.info.run_id, _mlflow_address,
        show=_show_mlflow, fail=_fail_mlflow,
    ),
    "trackio": Service(
        lambda run: {"name": run.id or run.name, "resume": "must" if run.id else "never", "embed": False},
        lambda own: own.name, show=_show_trackio,
    ),
    "comet": Service(
        lambda run: {"experiment_key": run.id, "mode": "get" if run.id else "create"},
        lambda own: own.get_key(), lambda own: own.url, _begin_comet, _show_comet,
    ),
    "aim": Service(
        lambda run: {"logging_dir": None, "run_hash": run.id, "experiment": run.project},
        lambda own: own.hash, begin=_begin_aim, show=_show_aim,
    ),
    "clearml": Service(
        _clearml_options, lambda own: own.id, lambda own: own.get_output_log_web_page(), show=_show_table
    ),
    "dvclive": Service(
        lambda run: {"dir": f"{run.own}/dvclive", "resume": run.id is not None}, lambda own: own.dir
    ),
    "swanlab": Service(
        _swanlab_options, lambda own: own.id, show=_show_swanlab
    ),
}  # fmt: skip
