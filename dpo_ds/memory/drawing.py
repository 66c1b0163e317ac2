"""What `dpo-ds rl` holds while it draws, and the longest row that it trains on."""

from __future__ import annotations

from dpo_ds.batch import Segment
from dpo_ds.config import RlConfig

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
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    batch = max(run.rl.batch_size, run.rl.n)
    tokens = batch * (run.data.max_prompt_length + run.rl.max_new_tokens)
    return {
        "keys and values of what is drawn (rl.batch_size)": 2 * width * text.num_hidden_layers * heads * size * tokens,
        "logits of the next tokens": LOGITS_COPIES * 4 * batch * text.vocab_size,
    }
