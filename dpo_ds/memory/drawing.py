"""What `dpo-ds rl` holds while it draws, the longest row that it trains on, and its other models' shapes."""

from __future__ import annotations

from dpo_ds.batch import Segment
from dpo_ds.config import RlConfig, critic_section, names_model
from dpo_ds.models.loading import check_shape

LOGITS_COPIES = 3  # float32: logits, probabilities, and one more in between


def longest_groups(run: RlConfig) -> tuple[Segment, ...]:
    """Returns a packed row of train.micro_batch_tokens tokens of the longest prompts with rl.n of the longest
    completions; one prompt's if that is longer.
    """
    prompt, completions = run.data.max_prompt_length, (run.rl.max_new_tokens,) * run.rl.n
    segments = [Segment(0, prompt, completions)]
    while segments[-1].end + prompt + sum(completions) <= run.train.micro_batch_tokens:
        segments.append(Segment(segments[-1].end, prompt, completions))
    return tuple(segments)


def drawing(run: RlConfig, config, width: int) -> dict[str, int]:
    """Returns bytes of what a rank draws rl.batch_size completions with, beside weights; width: of a number in the
    model's type.
    """
    batch = max(run.rl.batch_size, run.rl.n)
    tokens = batch * (run.data.max_prompt_length + run.rl.max_new_tokens)
    return {
        "keys and values of what is drawn (rl.batch_size)": width * cached_numbers(config) * tokens,
        "logits of the next tokens": LOGITS_COPIES * 4 * batch * config.get_text_config().vocab_size,
    }


def cached_numbers(config) -> int:
    """Returns how many numbers all layers keep of a token: keys and values, or what both are made from (DeepSeek V2's
    latent attention, arXiv 2405.04434).
    """
    text, numbers = config.get_text_config(), 0
    for layer in (text.per_layer_config[number] for number in range(text.num_hidden_layers)):
        if latent := getattr(layer, "kv_lora_rank", None):
            numbers += latent + layer.qk_rope_head_dim
            continue
        heads = getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads
        numbers += 2 * heads * (getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads)
    return numbers


def critic_shape(run: RlConfig, model_config):
    """Returns the config of the model of values, None for an algorithm without one; model_config: the policy's."""
    section = critic_section(run)
    if section is None:
        return None
    if section.path == run.model.path:
        return model_config
    return check_shape(section, section.path, "rl.critic", classifier=True)


def judge_shape(run: RlConfig):
    """Returns the config of the reward model that scores, None where that is a function or a pattern."""
    if not names_model(run.rl.score):
        return None
    section = run.model.model_copy(update={"path": run.rl.score, "revision": None})
    return check_shape(section, run.rl.score, "rl.score", classifier=True)
