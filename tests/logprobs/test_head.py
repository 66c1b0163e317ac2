"""The log-prob head against Hugging Face models' own logits, and what it refuses."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
)
from transformers import PretrainedConfig as Config

from dpo_ds.errors import ModelError
from dpo_ds.logprobs import TokenStatistics
from dpo_ds.logprobs.head import LogProbHead, _logit_transform, install_head

V = 131
COMMON = dict(
    vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**COMMON),
    "gemma2": Gemma2Config(**COMMON, head_dim=8, final_logit_softcapping=2.0),
    "cohere": CohereConfig(**COMMON, logit_scale=0.3),
    "granite": GraniteConfig(**COMMON, logits_scaling=5.0),
    "gpt2": GPT2Config(vocab_size=V, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2),
}


def tiny(family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]).eval()
    with torch.no_grad():  # logits of a few units, so that a scale or a cap shows
        model.get_output_embeddings().weight.mul_(30)
    return model


@pytest.mark.parametrize("backend", ["eager", "chunked"])
@pytest.mark.parametrize("family", CONFIGS)
def test_matches_the_models_own_logits_and_gradients(family, backend):
    model = tiny(family)
    ids = torch.randint(V, (2, 7), generator=torch.Generator().manual_seed(1))
    rows, targets = torch.tensor([0, 3, 4, 9, 12]), torch.tensor([5, 0, V - 1, 77, 5])
    weights = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0])
    expected = torch.log_softmax(model(ids).logits.flatten(0, 1)[rows], -1).gather(1, targets[:, None]).squeeze(1)
    (expected * weights).sum().backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    head = install_head(model, backend=backend)
    hidden = model.base_model(ids).last_hidden_state
    logps = head(hidden.flatten(0, 1)[rows], targets)
    torch.testing.assert_close(logps, expected, rtol=0, atol=2e-5)
    (logps * weights).sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, wanted[name], rtol=1e-4, atol=1e-5, msg=name)
    statistics = head(hidden.flatten(0, 1)[rows], targets, with_statistics=True)
    assert isinstance(statistics, TokenStatistics)
    assert torch.equal(statistics.logps, logps)


def test_keeps_parameter_tie_and_generation():
    model = tiny("gpt2")
    prompt = torch.tensor([[3, 4, 5]])
    before = model.generate(prompt, max_new_tokens=5, do_sample=False)
    weight = model.lm_head.weight
    head = install_head(model)
    assert model.lm_head is head and isinstance(head, LogProbHead)
    assert head.weight is weight and model.get_input_embeddings().weight is weight
    assert torch.equal(model.generate(prompt, max_new_tokens=5, do_sample=False), before)
    assert install_head(model, backend="eager") is head and head.backend == "eager"


def test_logits_scaling_divides_in_granite_and_multiplies_in_hyperclovax():
    def transform(model_type, **values):
        config = Config(**values)
        config.model_type = model_type
        return _logit_transform(config)

    assert transform("granite", logits_scaling=4.0) == (0.25, None)
    assert transform("hyperclovax", logits_scaling=4.0) == (4.0, None)
    assert transform("falcon_h1", lm_head_multiplier=0.5) == (0.5, None)
    assert transform("cohere2", logit_scale=0.25, final_logit_softcapping=None) == (0.25, None)
    assert transform("gemma2", final_logit_softcapping=30.0) == (1.0, 30.0)


def test_refuses_a_head_with_lora():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny("llama"), peft.LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ModelError, match="adapter on the head"):
        install_head(model)


def test_refuses_an_adapter_by_its_shape():  # as above where peft is not installed
    class Adapter(nn.Linear):
        base_layer = None

    model = tiny("llama")
    model.lm_head = Adapter(16, V, bias=False)
    with pytest.raises(ModelError, match="LlamaForCausalLM's head.*Adapter: an adapter on the head is not supported"):
        install_head(model)


def test_refuses_other_heads_and_none():
    model = tiny("llama")
    model.lm_head = nn.Sequential(nn.Linear(16, V))
    with pytest.raises(ModelError, match="torch.nn.modules.container.Sequential, not a plain torch.nn.Linear"):
        install_head(model)
    small = dict(vocab_size=V, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    bert = BertModel(BertConfig(**small))
    with pytest.raises(ModelError, match="no output embedding"):
        install_head(bert)
