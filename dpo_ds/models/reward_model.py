"""transformers' sequence classification with one label as a reward model: a batch in, the score of each completion out.

The score is read at a completion's last token, as AutoModelForSequenceClassification does. A causal language model gets
a new head; a classifier of one label is trained on.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from dpo_ds.batch import Batch
from dpo_ds.cluster import collectives
from dpo_ds.config import ModelSection
from dpo_ds.errors import ModelError
from dpo_ds.models.adapters import folder_of
from dpo_ds.models.causal_lm import decoder_of, hidden_states
from dpo_ds.models.layers.rope import take_lengths, tell_lengths
from dpo_ds.models.loading import CLASSIFIER, load_model
from dpo_ds.models.packed.spread import whole

REWARD_MEAN = "reward_mean"  # in config.json: the mean score over calibration data, which scoring subtracts
HEAD = "score.weight"
INITIAL_STD = 0.02  # of a new head
AUTO_CLASS = AutoModelForSequenceClassification.__name__


class RewardHead(nn.Linear):
    """The model's own `score` layer; its scores are float32 whatever the weights' type."""

    def forward(self, hidden: Tensor) -> Tensor:  # [..., D] -> [..., 1] float32
        return linear(hidden.float(), self.weight.float())


class RewardModel(nn.Module):
    """Takes a batch in either layout and gives the score of every completion: what DeepSpeed's engine wraps.

    Raises ModelError for a classifier whose head is not a plain `score` layer of one output.
    """

    def __init__(self, classifier: PreTrainedModel):
        super().__init__()
        head = getattr(classifier, "score", None)
        if type(head) not in (nn.Linear, RewardHead) or head.bias is not None or head.out_features != 1:
            found = "none" if head is None else f"{type(head).__name__} of {getattr(head, 'out_features', '?')} outputs"
            rule = "no adapter, a torch.nn.Linear of one output without bias"
            raise ModelError(f"{type(classifier).__name__}: its 'score' layer is {found}; a reward model's is {rule}")
        head.__class__ = RewardHead
        head.requires_grad_(True)  # beside adapters, too: it is new
        take_lengths(classifier)
        self.causal_lm = classifier  # the name that engines, checkpoints and exports know

    def forward(self, batch: Batch, own_logits: bool = False) -> Tensor:  # [sequences] float32
        """Scores, those of a group adjacent; `own_logits`: from the model's own forward on the sequences of a padded
        batch one by one, as a check.
        """
        if own_logits:
            return self._own_scores(batch)
        hidden, rows = hidden_states(self.causal_lm, batch), last_rows(batch)
        if batch.part is None:
            return self.causal_lm.score(hidden[rows])[:, 0]
        rows = rows - batch.part.start
        places = ((rows >= 0) & (rows < batch.part.length)).nonzero()[:, 0]
        return whole(self.causal_lm.score(hidden[rows[places]])[:, 0], places, len(rows))

    def _own_scores(self, batch: Batch) -> Tensor:
        tell_lengths(self.causal_lm, None)
        text_config = self.causal_lm.config.get_text_config()
        pad = text_config.pad_token_id
        text_config.pad_token_id = None  # else it passes over a last token that equals it
        lengths = batch.attention_mask.sum(1).tolist()
        sequences = [ids[None, :length] for ids, length in zip(batch.input_ids, lengths, strict=True)]
        scores = [self.causal_lm(input_ids=ids, use_cache=False).logits for ids in sequences]
        text_config.pad_token_id = pad
        return torch.cat(scores)[:, 0].float()


class ValueModel(RewardModel):
    """A reward model's architecture read at every token: the value of the state before each target, of prompt and the
    tokens so far; the critic of PPO.
    """

    def forward(self, batch: Batch, own_logits: bool = False) -> Tensor:  # [N] float32
        """Values in the order of targets; `own_logits`: of the sequences of a padded batch one by one, as a check."""
        if own_logits:
            return self._own_values(batch)
        return self.causal_lm.score(hidden_states(self.causal_lm, batch)[batch.target_rows])[:, 0]

    def _own_values(self, batch: Batch) -> Tensor:
        tell_lengths(self.causal_lm, None)
        width, decoder = batch.input_ids.shape[1], decoder_of(self.causal_lm)
        lengths = batch.attention_mask.sum(1).tolist()
        states = [
            pad(decoder(input_ids=ids[None, :length]).last_hidden_state[0], (0, 0, 0, width - length))
            for ids, length in zip(batch.input_ids, lengths, strict=True)
        ]
        return self.causal_lm.score(torch.cat(states)[batch.target_rows])[:, 0]


def last_rows(batch: Batch) -> Tensor:  # [sequences]
    """The rows of the flattened hidden states that belong to the completions' last tokens, in the order of
    `target_counts`: after the last one that predicts a target.
    """
    if batch.segments is not None:
        rows = [end for segment in batch.segments for end in segment.ends]
        return torch.tensor(rows, dtype=torch.int64, device=batch.input_ids.device) - 1
    lengths = batch.attention_mask.sum(1)
    rows = torch.arange(len(lengths), device=lengths.device) * batch.input_ids.shape[1] + lengths - 1
    return rows[: len(batch.target_counts)]  # an empty batch has one row, of nobody


def check_reward_model(section: ModelSection, config, key: str = "model.path") -> None:
    """Raises ModelError: transformers has no such classifier, or the folder is a classifier of several labels."""
    remote = section.trust_remote_code and AUTO_CLASS in getattr(config, "auto_map", {})
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING and not remote:
        raise ModelError(
            f"--{key} {section.path}: transformers has no sequence classification for model_type "
            f"{config.model_type!r}, so it cannot become a reward model"
        )
    if is_classifier(config) and config.num_labels != 1:
        raise ModelError(
            f"--{key} {section.path}: a classifier of {config.num_labels} labels; a reward model has 1: start "
            "from a causal language model or from a classifier of one label"
        )


def is_classifier(config) -> bool:
    return any(name.endswith(CLASSIFIER) for name in config.architectures or ())


def load_classifier(section: ModelSection, ds_config: dict, seed: int) -> PreTrainedModel:
    """`load_model`'s; what was a causal language model gets a new head, normal with INITIAL_STD, drawn from `seed` and
    equal on all ranks. All ranks enter.
    """
    config = AutoConfig.from_pretrained(
        folder_of(section.path), revision=section.revision, trust_remote_code=section.trust_remote_code
    )
    is_new = section.from_config or not is_classifier(config)
    new = (HEAD,) if is_new else ()
    classifier = load_model(AutoModelForSequenceClassification, section, ds_config, {"num_labels": 1}, new)
    if is_new and hasattr(classifier, "score"):
        _draw(classifier.score.weight, seed)
    return classifier


def _draw(weight: nn.Parameter, seed: int) -> None:
    import deepspeed

    with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):  # rank 0's is broadcast
        if collectives.rank() == 0:
            weight.data.copy_(INITIAL_STD * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)))


def settle_padding(classifier: PreTrainedModel, tokenizer) -> str | None:
    """Gives model and tokenizer a padding token that ends no text: transformers looks for the last token that is none.

    It is the first of pad, bos and unk that is not EOS. Returns a line for the user where there is none such: then the
    model takes texts one by one alone, and transformers says so.
    """
    text_config = classifier.config.get_text_config()
    for name in ("pad_token", "bos_token", "unk_token"):
        token = getattr(tokenizer, f"{name}_id")
        if token is not None and token != tokenizer.eos_token_id and token < text_config.vocab_size:
            tokenizer.pad_token = getattr(tokenizer, name)
            tokenizer.padding_side = "right"
            text_config.pad_token_id = token
            return None
    text_config.pad_token_id = None
    return (
        "final/ has no padding token: the tokenizer has none but EOS, at which the score is read; it scores texts one "
        "at a time"
    )
