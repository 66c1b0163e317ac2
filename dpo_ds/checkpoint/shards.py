"""A checkpoint's shards, read memory-mapped and in any split: for any number of ranks, and for the export.

DeepSpeed's ZeRO-3 cuts every parameter into `ranks` slices of ceil(numel / ranks) elements, the last one padded; a rank
keeps its slices of a sub-group's parameters end to end in one flat fp32 tensor, and Adam's moments in two more. Which
parameters make up a sub-group depends on the number of ranks, so a parameter is found by its name.
"""

from __future__ import annotations

import math
import pickle
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dpo_ds.checkpoint.manifest import Checkpoint, shard_suffix
from dpo_ds.cluster import collectives
from dpo_ds.errors import ConfigError

KINDS = ("weight", "exp_avg", "exp_avg_sq")
ENGINE_PREFIX = "causal_lm."  # of a transformers name, inside what the engine wraps
HYPER_PARAMETERS = ("lr", "betas", "eps", "weight_decay")


@dataclass(frozen=True)
class Slices:
    """Places a parameter's slices: its sub-group, and offset and length of every rank's slice in the flat tensor."""

    shape: torch.Size
    group: int
    offset: int
    length: int


class Shards:
    """Reads any part of all ranks' shards of a checkpoint; a byte is read when it is asked for.

    part: the engine beside the policy's that they are of, as it was saved.
    """

    def __init__(self, checkpoint: Checkpoint, part: str = ""):
        self.checkpoint, self.part = checkpoint, part
        self.ranks = checkpoint.world_size
        self._optimizers: dict[int, dict] = {}

    @cached_property
    def slices(self) -> dict[str, Slices]:
        """Returns where the slices lie of every trained parameter by its name in the engine's module."""
        found = {}
        for group, shapes in enumerate(self._open("model", 0)["param_shapes"]):
            offset = 0
            for name, shape in shapes.items():
                length = math.ceil(math.prod(shape) / self.ranks)
                found[name] = Slices(torch.Size(shape), group, offset, length)
                offset += length
            assert offset == len(self._flat(0, "weight", group)), f"sub-group {group} is laid out otherwise"
        return found

    @property
    def step_count(self) -> int:
        """Adam's, the same for all parameters."""
        return int(self._optimizer(0)["optimizer_state_dict"]["state"][0]["step"])

    @property
    def hyper_parameters(self) -> list[dict]:
        groups = self._optimizer(0)["optimizer_state_dict"]["param_groups"]
        return [{key: group[key] for key in HYPER_PARAMETERS} for group in groups]

    def random_state(self, rank: int) -> dict:
        return self._open("model", rank)["random_state"]

    def extra(self, rank: int) -> dict:
        """Returns what this rank gave CheckpointWriter.save beside the engine's state."""
        return self._open("model", rank).get("extra", {})

    def read(self, name: str, kind: str, start: int, stop: int) -> Iterator[Tensor]:
        """Elements start..stop of the flattened parameter (or moment), in pieces; fp32, mapped from the files."""
        slices = self.slices[name]
        while start < stop:
            rank, within = divmod(start, slices.length)
            count = min(stop - start, slices.length - within)
            yield self._flat(rank, kind, slices.group).narrow(0, slices.offset + within, count)
            start += count

    def whole(self, name: str, dtype: torch.dtype) -> Tensor:
        """The parameter in memory, rounded from fp32."""
        flat = torch.empty(math.prod(self.slices[name].shape), dtype=dtype)
        start = 0
        for piece in self.read(name, "weight", 0, len(flat)):
            flat[start : start + len(piece)].copy_(piece)
            start += len(piece)
        return flat.view(self.slices[name].shape)

    def buffer(self, name: str) -> Tensor:
        return self._open("model", 0)["module"][name]

    def _flat(self, rank: int, kind: str, group: int) -> Tensor:
        optimizer = self._optimizer(rank)
        if kind == "weight":
            return optimizer["fp32_flat_groups"][group].detach()
        return optimizer["optimizer_state_dict"]["state"][group][kind]

    def _optimizer(self, rank: int) -> dict:
        if rank not in self._optimizers:
            self._optimizers[rank] = self._open("optim", rank)["optimizer_state_dict"]
        return self._optimizers[rank]

    def _open(self, kind: str, rank: int) -> dict:
        suffix = shard_suffix(kind, rank, self.part)
        path = self.checkpoint.path / next(name for name in self.checkpoint.manifest["files"] if name.endswith(suffix))
        try:
            with torch.serialization.safe_globals(_known_classes()):
                return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            named = re.search(r"GLOBAL (\S+)", str(error))
            what = f"names {named[1]}" if named else "is no file that torch saved"
            raise ConfigError(
                f"{path}: {what}, which no checkpoint of dpo_ds needs; loading it could run foreign code, so it is not "
                "loaded"
            ) from error


def load(engine, checkpoint: Checkpoint, part: str = "") -> list[dict]:
    """Weights, Adam's state and random numbers into a fresh engine of any number of ranks. All ranks enter.

    part: of an engine beside the policy's, as it was saved.

    Each rank reads the slices that are its own now. At the checkpoint's number of ranks all is bit-equal; at another,
    random numbers start anew.

    Returns:
        The `extra` of every rank that saved, in their order; tensors are mapped from the files, so copy what is kept.
    Raises:
        ConfigError: the parameters are not the checkpoint's.
    """
    shards, optimizer = Shards(checkpoint, part), engine.optimizer
    with collectives.raising_together():  # a file that one rank refuses ends all of them
        state = _own_state(engine, shards)
        extra = [shards.extra(saved) for saved in range(shards.ranks)]
        numbers = shards.random_state(collectives.rank()) if collectives.world_size() == shards.ranks else None
    optimizer.checkpoint_event_prologue()
    optimizer.load_state_dict({collectives.rank(): state})
    optimizer.checkpoint_event_epilogue()
    if numbers is not None:
        set_random_state(numbers)
    return extra


def _own_state(engine, shards: Shards) -> dict:
    """Fills a fresh optimizer's state with this rank's slices; DeepSpeed then loads it as if it had saved it itself."""
    optimizer, rank = engine.optimizer, collectives.rank()
    groups = [[(engine.param_names[parameter], parameter) for parameter in group] for group in optimizer.fp16_groups]
    _check_names({name: parameter.ds_shape for group in groups for name, parameter in group}, shards)
    state = optimizer._rigid_state_dict()
    adam = state["optimizer_state_dict"]
    is_torch_adam = isinstance(optimizer.optimizer, torch.optim.AdamW)  # its step is a tensor, in DeepSpeed's a number
    for index, (group, flat) in enumerate(zip(groups, optimizer.fp32_partitioned_groups_flat, strict=True)):
        moments = {kind: torch.zeros(len(flat), dtype=torch.float32) for kind in KINDS[1:]}
        offset = 0
        for name, parameter in group:
            length = parameter.partition_numel()
            start = min(rank * length, parameter.ds_numel)
            stop = min(start + length, parameter.ds_numel)
            for kind, target in {"weight": flat.data, **moments}.items():
                position = offset
                for piece in shards.read(name, kind, start, stop):
                    target.narrow(0, position, len(piece)).copy_(piece)
                    position += len(piece)
            offset += length
        step = torch.tensor(float(shards.step_count)) if is_torch_adam else shards.step_count
        adam["state"][index] = {"step": step, **moments}
    for group, saved in zip(adam["param_groups"], shards.hyper_parameters, strict=True):
        group.update(saved)
    return state


def _known_classes() -> list:
    """Returns the classes that shards hold beside tensors and plain values; nothing else of a file is unpickled."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
    from deepspeed.runtime.zero.config import ZeroStageEnum

    numpys = [np.ndarray, np.dtype, type(np.dtype(np.uint32)), np.array(0).__reduce__()[0]]  # shards of before 0.2
    slices = PartitionedParamStatus  # an attribute of the slices that a reference which follows the policy saves
    return [LossScaler, ZeroStageEnum, slices, *numpys]


def random_state() -> dict:
    """Returns the state of every generator that this rank may draw from, as plain values and tensors."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    name, keys, *rest = np.random.get_state()
    numpys = (name, torch.from_numpy(keys.astype(np.int64)), *rest)
    return {"python": random.getstate(), "numpy": numpys, "torch": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict) -> None:
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.asarray(keys).astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _check_names(shapes: dict[str, torch.Size], shards: Shards) -> None:
    saved = {name: slices.shape for name, slices in shards.slices.items()}
    for name in sorted(shapes.keys() | saved.keys()):
        if shapes.get(name) != saved.get(name):
            now, before = (tuple(found[name]) if name in found else "no such parameter" for found in (shapes, saved))
            path = shards.checkpoint.path
            raise ConfigError(f"{path}: {name} is {before} there, {now} in this model; resume needs the same model")
