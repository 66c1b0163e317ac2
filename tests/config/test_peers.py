"""Keys of other trainers: each has an answer, and the answers are true."""

import pytest

from dpo_ds import config
from dpo_ds.commands import cli
from dpo_ds.config.peers.names import answer_to, names
from dpo_ds.errors import ConfigError

KEYS = {key for settings in config.COMMANDS.values() for key in config.keys(settings)}
# dataclasses.fields(trl.DPOConfig) of TRL 1.16 with transformers 5.23
DPO_CONFIG = """
output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs
warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon optim_target_modules
gradient_accumulation_steps average_tokens_across_devices max_grad_norm label_smoothing_factor bf16 fp16 bf16_full_eval
fp16_full_eval tf32 activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing
gradient_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode use_liger_kernel
liger_kernel_config use_cache neftune_noise_alpha torch_empty_cache_steps auto_find_batch_size logging_strategy
logging_steps logging_first_step log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen log_level
log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id
eval_strategy eval_steps eval_delay per_device_eval_batch_size prediction_loss_only eval_on_start
eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics
save_only_model save_strategy save_steps save_on_each_node save_total_limit enable_jit_checkpoint push_to_hub hub_token
hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision load_best_model_at_end metric_for_best_model
greater_is_better ignore_data_skip restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu
accelerator_config parallelism_config dataloader_drop_last dataloader_num_workers dataloader_pin_memory
dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order
remove_unused_columns label_names train_sampling_strategy length_column_name ddp_find_unused_parameters
ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config deepspeed debug
skip_memory_metrics do_train do_eval do_predict resume_from_checkpoint local_rank model_init_kwargs trust_remote_code
router_aux_loss_coef disable_dropout dataset_num_proc max_length truncation_mode padding_free pad_to_multiple_of
precompute_ref_log_probs precompute_ref_batch_size loss_type loss_weights ld_alpha f_divergence_type
f_alpha_divergence_coef label_smoothing beta use_weighting discopop_tau activation_offloading sync_ref_model
ref_model_mixup_alpha ref_model_sync_steps pad_token
""".split()


def test_every_key_of_trls_dpo_config_is_answered():
    assert [key for key in DPO_CONFIG if answer_to(key) is None] == []


def test_every_key_of_the_installed_trl_is_answered():
    trl = pytest.importorskip("trl")
    from dataclasses import fields

    found = {field.name for peer in (trl.DPOConfig, trl.SFTConfig, trl.RewardConfig) for field in fields(peer)}
    assert sorted(found - names().keys()) == []


def test_answers_name_keys_that_are_there():
    assert {answer.key for answer in names().values()} - KEYS - {""} == set()
    for name, answer in names().items():
        assert answer.key or " " in answer.remark, name


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["train", "--learning_rate", "1"], "unknown key --learning_rate; here: --train.learning_rate"),
        (["sft", "--num-train-epochs", "1"], "unknown key --num-train-epochs; here: --train.epochs"),
        (["train", "--bf16", "true"], "unknown key --bf16; here: bf16.enabled of the DeepSpeed JSON"),
        (["train", "--fp16"], "unknown key --fp16; not here, because the loss would need scaling"),
        (["train", "--train.beta", "1"], "unknown key --train.beta; here: --loss.beta"),
        (["sft", "--beta", "1"], "unknown key --beta; here: --loss.beta, which this command does not have"),
        (["train", "--train.learning_rat", "1"], "did you mean 'train.learning_rate'?"),
        (["train", "--train.lr", "1"], "did you mean 'train.learning_rate'?"),
    ],
)
def test_the_command_line_is_told_our_keys(argv, said):
    with pytest.raises(ConfigError) as mistake:
        cli.parse(argv)
    assert said in str(mistake.value)


def test_a_file_is_told_our_keys(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("per_device_train_batch_size: 4\n")
    with pytest.raises(ConfigError, match="unknown key 'per_device_train_batch_size'; here: --train.global_batch_size"):
        config.load("train", str(path), {})
