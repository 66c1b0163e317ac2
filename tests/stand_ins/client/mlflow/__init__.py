"""Stands in for mlflow where it is not installed: what accelerate's tracker and ours call of it, over the same HTTP."""

import json
import os
import time
import urllib.request
from types import SimpleNamespace

utils = SimpleNamespace(validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=6000, MAX_PARAMS_TAGS_PER_BATCH=100))
_run = SimpleNamespace(info=None)


def get_tracking_uri():
    return os.environ["MLFLOW_TRACKING_URI"]


def search_experiments(filter_string):
    return [SimpleNamespace(**found) for found in _ask("experiments/search", filter=filter_string)["experiments"]]


def create_experiment(name, artifact_location, tags):
    return _ask("experiments/create", name=name)["experiment_id"]


def start_run(run_id, experiment_id, run_name, nested, tags, description):
    if run_id is None:
        answer = _ask("runs/create", experiment_id=experiment_id, run_name=run_name)
    else:
        answer = _ask("runs/get", method="GET")
        _ask("runs/update", run_id=run_id, status="RUNNING")
    _run.info = SimpleNamespace(**answer["run"]["info"])
    return _run


def log_params(params):
    _ask("runs/log-batch", params=[{"key": key, "value": str(value)} for key, value in params.items()])


def log_metrics(metrics, step):
    now = int(1000 * time.time())
    metrics = [{"key": key, "value": value, "timestamp": now, "step": step} for key, value in metrics.items()]
    _ask("runs/log-batch", metrics=metrics)


def log_artifact(local_path, artifact_path):
    url = f"{get_tracking_uri()}/api/2.0/mlflow-artifacts/artifacts/1/r1/artifacts/{os.path.basename(local_path)}"
    with open(local_path, "rb") as file:
        urllib.request.urlopen(urllib.request.Request(url, file.read(), method="PUT"))


def end_run(status="FINISHED"):
    _ask("runs/update", run_id=_run.info.run_id, status=status)


def _ask(what, method="POST", **asked):
    data = json.dumps(asked).encode() if method == "POST" else None
    request = urllib.request.Request(f"{get_tracking_uri()}/api/2.0/mlflow/{what}", data, method=method)
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)
