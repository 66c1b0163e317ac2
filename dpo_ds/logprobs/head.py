"""The language-model head as a module that gives token log-probs: inside its forward ZeRO-3 holds the weight whole."""

from __future__ import annotations

from torch import Tensor, nn

from dpo_ds.errors import ModelError
from dpo_ds.logprobs import TokenStatistics, token_logps, token_statistics


class LogProbHead(nn.Linear):
    """An `nn.Linear` whose forward also gives log-probs; made by `install_head`.

    scale multiplies the logits, softcap bounds them (None: off), backend is `token_logps`'s.
    """

    scale: float = 1.0
    softcap: float | None = None
    backend: str = "auto"

    def forward(
        self, hidden: Tensor, targets: Tensor | None = None, with_statistics: bool = False
    ) -> Tensor | TokenStatistics:
        """Plain logits [..., V], as nn.Linear gives them, without targets [N]; with them and hidden [N, D] the token
        log-probs [N] float32, or TokenStatistics if asked for.

        All ranks enter, also with N = 0: ZeRO-3 gathers the weight around this forward and around its backward.
        """
        if targets is None:
            return super().forward(hidden)
        compute = token_statistics if with_statistics else token_logps
        return compute(
            hidden, self.weight, targets, bias=self.bias, scale=self.scale, softcap=self.softcap, backend=self.backend
        )


def install_head(causal_lm: nn.Module, backend: str = "auto") -> LogProbHead:
    """Turns the model's output embedding into a LogProbHead in place: same module, same Parameter, tie kept.

    Logit scale and soft-cap come from the model's config. Raises ModelError for a head that is not a plain nn.Linear.
    """
    name = type(causal_lm).__name__
    head = causal_lm.get_output_embeddings()
    if head is None:
        raise ModelError(f"{name} has no output embedding: log-probs need a causal language model")
    if type(head) not in (nn.Linear, LogProbHead):
        kind = f"{type(head).__module__}.{type(head).__name__}"
        if hasattr(head, "lora_A") or hasattr(head, "base_layer"):
            raise ModelError(
                f"{name}'s head is {kind}: an adapter on the head is not supported; take it out of the target modules"
            )
        raise ModelError(f"{name}'s head is {kind}, not a plain torch.nn.Linear: chunks of it cannot be computed")
    head.__class__ = LogProbHead
    head.scale, head.softcap = _logit_transform(causal_lm.config.get_text_config())
    head.backend = backend
    return head


def _logit_transform(config) -> tuple[float, float | None]:
    """(scale, softcap) that the model's own forward applies to its head's output."""
    scale = 1.0
    for key in ("logit_scale", "lm_head_multiplier", "output_multiplier"):  # Cohere; Falcon-H1; Muse Glimmer
        scale *= getattr(config, key, None) or 1.0
    logits_scaling = getattr(config, "logits_scaling", None) or 1.0  # Granite divides by it, HyperCLOVA X multiplies
    scale = scale * logits_scaling if config.model_type.startswith("hyperclovax") else scale / logits_scaling
    caps = (getattr(config, key, None) for key in ("final_logit_softcapping", "logits_soft_cap"))
    return scale, next(filter(None, caps), None)  # Gemma 2; RecurrentGemma
