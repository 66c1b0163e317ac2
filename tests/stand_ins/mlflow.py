"""An MLflow tracking server, as much of it as its client needs; in memory. Its client's stand-in is client/mlflow."""

from __future__ import annotations

import json
import threading
from typing import Any

from tests.stand_ins.http import Handler


class MLflow(Handler):
    """Keeps of the one run: metrics as name -> {step: value}, params, artifacts, starts and the status.

    dies_at: the step whose metrics find no server any more; hangs: whether they get no answer instead.
    """

    metrics: dict[str, dict[int, float]]
    params: dict[str, str]
    artifacts: dict[str, bytes]
    starts: list[str]
    status: str
    dies_at: int | None
    hangs: bool

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        if self.command == "PUT":
            self.artifacts[path.rsplit("/", 1)[1]] = body
            return 200, {}
        asked = json.loads(body or b"{}")
        info = {"run_id": "r1", "run_uuid": "r1", "experiment_id": "1", "lifecycle_stage": "active"}
        info |= {"status": self.status, "artifact_uri": "mlflow-artifacts:/1/r1/artifacts"}
        run = {"info": info, "data": {}}
        match path.rsplit("mlflow/", 1)[1]:
            case "experiments/search":
                return 200, {"experiments": []}
            case "experiments/create":
                return 200, {"experiment_id": "1"}
            case "runs/create":
                self.starts.append(asked["run_name"])
                return 200, {"run": run}
            case "runs/get":
                return 200, {"run": run}
            case "runs/update":
                type(self).status = asked.get("status", self.status)
                return 200, {"run_info": info}
            case "runs/log-batch":
                self._log(asked)
                return 200, {}
        return 404, {"error_code": "ENDPOINT_NOT_FOUND", "message": path}

    def _log(self, batch: dict) -> None:
        self.params.update({param["key"]: param["value"] for param in batch.get("params", [])})
        for metric in batch.get("metrics", []):
            if metric["step"] == self.dies_at:
                threading.Event().wait(60 if self.hangs else 0)
                self.die()
            self.metrics.setdefault(metric["key"], {})[metric["step"]] = metric["value"]


def new_mlflow(**state) -> type[MLflow]:
    """Returns a server of its own, without runs."""
    empty = {"metrics": {}, "params": {}, "artifacts": {}, "starts": [], "status": "", "dies_at": None, "hangs": False}
    return type("NewMLflow", (MLflow,), empty | state)
