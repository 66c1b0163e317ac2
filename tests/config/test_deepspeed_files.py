"""Every file in ds_configs/: filled for both engines, and two steps of training with all that a CPU can run."""

import json
import math

import pytest

from dpo_ds.config import TrainSection
from dpo_ds.config import deepspeed as ds_config
from dpo_ds.config.deepspeed import Machine
from tests.ranks import ROOT

FILES = sorted((ROOT / "ds_configs").glob("*.json"))
NOT_ON_CPU = {
    "zero3_bf16_nvme.json": "DeepSpeed builds its aio operator with a compiler and libaio",
    "zero3_reference.json": "for the reference alone: no policy trains with it",
}
TRAINED = [path for path in FILES if path.name not in NOT_ON_CPU and "hpz" not in path.name]
TRAINED.append(ROOT / "ds_configs/zero3_bf16_hpz.json")  # last: its process group stays for the engines after it


@pytest.fixture(scope="module")
def seen(forks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    out = folder / "out.json"
    codes, output = forks.run([out, *TRAINED], 2, folder, module="tests.workers.ds_files", timeout=240)
    assert codes == [0, 0], output[-2000:]
    return json.loads(out.read_text())


@pytest.mark.distributed
def test_files_train(seen):
    """Policy and reference begin equal, so the first loss is ln 2, and what is offloaded or copied changes nothing."""
    assert seen[0] == seen[1], "both ranks saw the same"
    for name, found in seen[0].items():
        assert found["losses"][0] == pytest.approx(math.log(2), abs=1e-6), name
        assert found["losses"][1] < 0.6 and found["finite"], name
        assert found["dtype"] == ("torch.float32" if name == "zero3_cpu.json" else "torch.bfloat16")
    plain = seen[0]["zero3_bf16.json"]
    for name in ("zero3_bf16_offload.json", "zero3_bf16_hpz.json"):
        assert seen[0][name]["losses"] == pytest.approx(plain["losses"], rel=1e-4), name
        assert seen[0][name]["norms"] == pytest.approx(plain["norms"], rel=1e-4), name


@pytest.mark.distributed
def test_what_a_file_asks_for_happens(seen):
    found = seen[0]
    assert found["zero3_bf16_offload.json"]["offloaded"] == {"offload_param": "cpu", "offload_optimizer": "cpu"}
    assert found["zero3_bf16_moe.json"]["leaves"] == 2, "one block of experts a layer"
    policy, reference = found["zero3_bf16_hpz.json"]["second copies"]
    assert policy > 0 and reference == 0
    assert found["zero3_bf16.json"]["second copies"] == [0, 0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_are_filled_for_both_engines(path):
    from deepspeed.runtime.config import DeepSpeedConfig

    given, machine = ds_config.read(str(path)), Machine(16, "cuda", True)
    policy, notes = ds_config.fill_policy(given, path.name, TrainSection(), machine, 4096)
    reference, _ = ds_config.fill_reference(given, path.name, machine, 4096)
    assert notes == []
    for filled in (policy, reference):
        assert '"auto"' not in json.dumps(filled | {"data_types": {}})
        assert DeepSpeedConfig(filled | {"train_batch_size": 1}).zero_config.stage == 3
    zero = reference["zero_optimization"]
    assert not {"offload_optimizer", "zero_hpz_partition_size"} & zero.keys() and "optimizer" not in reference
    assert zero.get("leaf_module") == policy["zero_optimization"].get("leaf_module")


def test_policy_and_reference_do_not_share_a_folder_on_the_nvme():
    """DeepSpeed 0.19.8 empties it for every engine (runtime/swap_tensor/partitioned_param_swapper.py)."""
    path = "ds_configs/zero3_bf16_nvme.json"
    reference, _ = ds_config.fill_reference(ds_config.read(str(ROOT / path)), path, Machine(8, "cuda", True), 4096)
    assert reference["zero_optimization"]["offload_param"]["nvme_path"] == "/local_nvme/reference"


def test_blocks_of_experts_are_classes_of_transformers():
    import transformers.models as models

    named = json.loads((ROOT / "ds_configs/zero3_bf16_moe.json").read_text())["zero_optimization"]["leaf_module"]
    families = "mixtral qwen2_moe qwen3_moe olmoe deepseek_v3 glm4_moe".split()
    for family, block in zip(families, named["classes"], strict=True):
        modeling = getattr(getattr(models, family), f"modeling_{family}")
        assert hasattr(modeling, block), block


def test_hpz_must_divide_the_ranks():
    given = {"zero_optimization": {"zero_hpz_partition_size": 8}}
    with pytest.raises(ds_config.ConfigError, match="zero_hpz_partition_size 8 does not divide 12 ranks"):
        ds_config.fill_policy(given, "ds.json", TrainSection(), Machine(12, "cuda", True), 64)
