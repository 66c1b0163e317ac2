"""A Hugging Face causal language model made ready to give log-probs: checked, loaded under ZeRO-3, dropout off."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo_ds.batch import Batch
from dpo_ds.errors import ModelError
from dpo_ds.logprobs.head import install_head
from dpo_ds.models.layers.rope import take_lengths, tell_lengths
from dpo_ds.models.packed.segments import segment_table
from dpo_ds.models.packed.spread import whole


class LogProbModel(nn.Module):
    """Takes a batch and gives the log-probs of its target tokens: the module that DeepSpeed's engine wraps.

    Only the rows that predict a completion token reach the head, which never forms their [N, V] logits.
    """

    def __init__(self, causal_lm: PreTrainedModel):
        super().__init__()
        install_head(causal_lm)
        take_lengths(causal_lm)
        self.causal_lm = causal_lm

    def forward(
        self, batch: Batch | None, own_logits: bool = False, with_statistics: bool = False, **inputs
    ) -> Tensor | tuple:
        """Token log-probs [N] float32 through the head, or TokenStatistics as a tuple; `own_logits`: from the logits of
        the model's own forward, as a check. Without a batch: that forward itself on `inputs`, to generate.
        """
        if batch is None or own_logits:
            tell_lengths(self.causal_lm, None)
        if batch is None:
            return self.causal_lm(**inputs)
        if own_logits:
            options = {"position_ids": batch.position_ids, "attention_mask": batch.attention_mask, "use_cache": False}
            logits = self.causal_lm(input_ids=batch.input_ids, **options).logits.flatten(0, 1)[batch.target_rows]
            return logits.float().log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
        head, hidden = self.causal_lm.get_output_embeddings(), hidden_states(self.causal_lm, batch)
        if batch.part is None:
            found = head(hidden[batch.target_rows], batch.targets, with_statistics)
            return tuple(found) if with_statistics else found
        rows, places = batch.part.rows, batch.part.places
        found = head(hidden[rows], batch.targets[places], with_statistics)
        if with_statistics:
            return tuple(whole(values, places, len(batch.targets)) for values in found)
        return whole(found, places, len(batch.targets))


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the model without its head.

    Raises:
        ModelError: it keeps no such part, as far as transformers' names tell.
    """
    if model.base_model is not model:
        return model.base_model
    parts = [part for part in model.children() if isinstance(part, PreTrainedModel)]  # Llama 4's prefix names none
    if len(parts) != 1:
        raise ModelError(f"{type(model).__name__}: it has no part that is its decoder alone, without the head")
    return parts[0]


def freeze_beside_text(model: PreTrainedModel) -> list[str]:
    """Freezes what a model of images or sounds has beside its text model, which no gradient reaches: AdamW's decay
    would shrink it. Returns the names of those parts.
    """
    if model.config.get_text_config() is model.config:
        return []
    head, inputs = model.get_output_embeddings(), model.get_input_embeddings()
    text = {*model.get_decoder().parameters(), *head.parameters(), *inputs.parameters()}
    score = getattr(model, "score", None)  # a reward model's
    text |= {*score.parameters()} if isinstance(score, nn.Module) else set()
    beside = {name: parameter for name, parameter in model.named_parameters() if parameter not in text}
    for parameter in beside.values():
        parameter.requires_grad_(False)
    parts = [name.removeprefix(f"{model.base_model_prefix}.").partition(".")[0] for name in beside]
    return sorted(set(parts))


def hidden_states(model: PreTrainedModel, batch: Batch) -> Tensor:  # [rows * length, D]
    """Returns what the model without its head makes of a batch in either layout, or of this rank's part of it."""
    tokens = batch if batch.part is None else batch.part
    layout = {}
    if batch.segments is not None:
        layout = {"segments": segment_table(tokens.segments), "is_spread": batch.part is not None}
    tell_lengths(model, batch)
    hidden = decoder_of(model)(
        input_ids=tokens.input_ids,
        position_ids=tokens.position_ids,
        attention_mask=batch.attention_mask,
        use_cache=False,
        **layout,
    ).last_hidden_state
    return hidden.flatten(0, 1)
