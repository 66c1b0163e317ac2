"""What a model is tried for before it trains: causality, chance, padding, and that its own code runs."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_ds.errors import ModelError
from dpo_ds.models.causal_lm import LogProbModel, freeze_beside_text
from dpo_ds.models.checks import check_head, settle_layout
from dpo_ds.models.engine import Replica
from dpo_ds.models.loading import own_dropout, switch_dropout_off, switch_jitter_off
from tests.families import tiny_config_of


def model_of(family: str, **settings) -> AutoModelForCausalLM:
    torch.manual_seed(0)
    config = tiny_config_of(family)
    for name, value in settings.items():
        setattr(config, name, value)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def replica(causal_lm) -> Replica:
    return Replica(LogProbModel(causal_lm), torch.device("cpu"))


def test_a_model_that_sees_later_tokens_is_refused():
    check_head(replica(model_of("bert-generation")))
    with pytest.raises(ModelError, match="BertGenerationDecoder: a token's log-prob changes by .* so it is no causal"):
        check_head(replica(model_of("bert-generation", is_decoder=False)))


def test_a_model_that_is_random_while_it_trains_is_refused():
    tried = replica(model_of("llama"))
    tried.engine.train()

    @contextmanager
    def evaluating():
        tried.engine.eval()
        yield
        tried.engine.train()

    tried.evaluating = evaluating
    check_head(tried)
    tried.causal_lm.model.norm.register_forward_hook(lambda m, _, out: nn.functional.dropout(out, 0.1, m.training))
    with pytest.raises(ModelError, match="LlamaForCausalLM: equal sequences differ by .* while it trains"):
        check_head(tried)


def test_a_model_whose_padding_leaks_is_refused():
    tried = replica(model_of("llama"))
    tried.causal_lm.model.norm.register_forward_hook(lambda _, args, out: out + 0.01 * out.shape[1])
    with pytest.raises(ModelError, match="a sequence's outputs differ by .* on average beside longer ones"):
        settle_layout("padded", [tried])


def test_a_model_whose_own_code_fails_is_one_line():
    tried = replica(model_of("llama"))
    tried.causal_lm.model.norm.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ModelError, match="its own forward fails: ZeroDivisionError: division by zero"):
        check_head(tried)


def test_dropout_is_off_in_nested_configs_and_comes_back_for_the_export():
    config = AutoConfig.for_model("gemma3")
    config.text_config.attention_dropout = 0.25
    rates = switch_dropout_off(config)
    assert rates["text_config.attention_dropout"] == 0.25 and config.text_config.attention_dropout == 0
    model = type("Model", (), {"config": config, "dropouts": rates})()
    with own_dropout(model):
        assert config.text_config.attention_dropout == 0.25
    assert config.text_config.attention_dropout == 0


def test_routers_do_not_jitter_while_they_train_and_keep_their_rate():
    """Phi's routers use theirs in evaluation, too: without it they are other routers."""
    model = model_of("phimoe", router_jitter_noise=0.2, input_jitter_noise=0.2)
    switch_jitter_off(model)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        model.eval()
        expected = model(ids).logits
        model.train()
        assert torch.equal(model(ids).logits, expected)


def test_a_tower_beside_the_text_is_kept_and_named():
    model = model_of("gemma3")
    assert freeze_beside_text(model) == ["multi_modal_projector", "vision_tower"]
    trained = {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"language_model"}
    assert freeze_beside_text(model_of("llama")) == []
