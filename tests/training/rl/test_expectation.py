"""REINFORCE on a model so small that all its completions can be written down: the gradient that it estimates from draws
is that of the expected score minus β KL.
"""

import contextlib
import itertools

import numpy as np
import pytest
import torch
import torch.distributed as dist

from dpo_ds.batch import padded_batch
from dpo_ds.config import RlConfig, RlSection
from dpo_ds.data.batching import Layout
from dpo_ds.data.prompts import Prompt
from dpo_ds.demo.tiny import random_model, special_ids, tiny_config, train_tokenizer
from dpo_ds.errors import ModelError
from dpo_ds.logprobs import TokenStatistics
from dpo_ds.models.causal_lm import LogProbModel
from dpo_ds.models.generation import Completion
from dpo_ds.training.rl.algorithms import Reinforce
from dpo_ds.training.rl.experience import Models, micro_batches
from dpo_ds.training.rl.learners import PolicyGradient, best_and_worst
from dpo_ds.training.rl.rollouts import Rollout, Sampler, penalised
from dpo_ds.training.rl.task import Reinforcement
from tests.rl_oracle import token_logps

BETA, LENGTH, DRAWS, PENALTY = 0.3, 2, 8000, 0.5
PROMPT = np.array([3, 2])


class Local:
    """A policy as engine.Policy, without DeepSpeed; a step changes nothing."""

    def __init__(self, causal_lm):
        self.engine, self.causal_lm = LogProbModel(causal_lm).eval(), causal_lm
        self.device, self.padded_attention = torch.device("cpu"), causal_lm.config._attn_implementation

    def token_logps(self, batch):
        return self.engine(batch)

    def token_statistics(self, batch):
        return TokenStatistics(*self.engine(batch, with_statistics=True))

    def evaluating(self):
        return contextlib.nullcontext()

    def backward(self, loss, is_last):
        loss.backward()

    def step(self, rate):
        return 1.0


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_best_is_put_against_the_worst():
    """The first of the highest score and the first of the lowest; where all are equal there is nothing to say."""
    drawn = [Completion(np.array([token]), "", True) for token in (1, 2, 3, 4)]
    group = Rollout(0, Prompt("", PROMPT, ""), drawn).group(5)
    pair = best_and_worst(group, np.array([0.5, 2.0, -1.0, 2.0]))
    assert [ids.tolist() for ids in pair.completions] == [[2], [3]] and pair.comparisons.tolist() == [[0, 1]]
    assert pair.index == 5 and pair.prompt is group.prompt
    assert best_and_worst(group, np.ones(4)) is None


def task_at(temperature: float) -> Reinforcement:
    sections = {
        "rl": {"prompts": "p", "score": "m:f", "temperature": temperature}, "model": {"path": "m"}, "output_dir": "o",
        "deepspeed": {"config": "c"},
    }  # fmt: skip
    return Reinforcement(RlConfig.model_validate(sections))


def test_log_probs_are_those_of_the_temperature_that_is_drawn_at():
    """At ½ all logits count twice; a bound on logits would have to come before."""
    policy = Local(random_model(tiny_config("llama", 50, hidden=16, layers=1)))
    group = Rollout(0, Prompt("", PROMPT, ""), [Completion(np.array([7, 3]), "", True)]).group(0)
    task_at(0.5).set_temperature([policy])
    logits = policy.causal_lm(input_ids=torch.tensor([[*PROMPT, 7, 3]])).logits[0]
    wanted = (2 * logits[1:3]).log_softmax(-1)[[0, 1], [7, 3]]
    assert policy.token_logps(padded_batch([group])).tolist() == pytest.approx(wanted.tolist(), abs=1e-5)
    bounded = Local(random_model(tiny_config("gemma2", 50, hidden=16, layers=1)))
    with pytest.raises(ModelError, match="rl.temperature 0.5: Gemma2ForCausalLM bounds its logits"):
        task_at(0.5).set_temperature([bounded])
    task_at(1.0).set_temperature([bounded])


def every_completion(vocabulary: int, eos: int) -> list[list[int]]:
    """All that end with EOS within LENGTH tokens, and those that do not end."""
    others = [token for token in range(vocabulary) if token != eos]
    found = []
    for length in range(LENGTH):
        found += [[*tokens, eos] for tokens in itertools.product(others, repeat=length)]
    return found + [list(tokens) for tokens in itertools.product(others, repeat=LENGTH)]


def score(ids) -> float:
    return float(sum(ids) % 5) - 1.0


def test_the_gradient_of_draws_is_that_of_the_expectation(one_rank):
    words = train_tokenizer(["a"], vocab_size=258)
    config = tiny_config("llama", 5, hidden=16, layers=1, **special_ids(words))
    models = [random_model(config, seed=seed) for seed in (0, 1)]
    for causal_lm in models:
        causal_lm.get_output_embeddings().weight.data *= 10  # not indifferent between its five tokens
    policy, reference = map(Local, models)
    eos = words.eos_token_id

    known = every_completion(5, eos)
    logps = torch.stack([token_logps(models[0], PROMPT.tolist(), ids).sum() for ids in known])
    with torch.no_grad():
        anchor = torch.stack([token_logps(models[1], PROMPT.tolist(), ids).sum() for ids in known])
    probs = logps.exp()
    assert probs.sum().item() == pytest.approx(1, abs=1e-5), "these are all"
    rewards = torch.tensor([score(ids) - PENALTY * (ids[-1] != eos) for ids in known])
    parameters = list(models[0].parameters())
    objective = (probs * (rewards - BETA * (logps - anchor))).sum()
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(objective, parameters, retain_graph=True)])
    # of one draw: A ∇log π; its projections on the exact gradient's direction vary by
    direction = exact / exact.norm()
    slopes = torch.stack([
        torch.cat([g.flatten() for g in torch.autograd.grad(own, parameters, retain_graph=True)]) @ direction
        for own in logps
    ])  # fmt: skip
    values = ((rewards - BETA * (logps - anchor)) * slopes).detach()
    assert (probs * values).sum().item() == pytest.approx(exact.norm().item(), rel=1e-4)
    error = ((probs * values.square()).sum() - exact.norm().square()).sqrt().item() / DRAWS**0.5

    settings = RlSection(prompts="-", score="-", max_new_tokens=LENGTH, batch_size=DRAWS, unfinished_penalty=PENALTY)
    sampler = Sampler(policy, words, None, settings, seed=0)
    [drawn] = sampler.draw([Prompt("", PROMPT, "")], [0], DRAWS, 1)
    scored = Rollout(0, drawn.prompt, drawn.completions, np.array([score(one.ids) for one in drawn.completions]))
    measured = Models(policy, reference, None).measure(micro_batches([scored.group(0)], Layout("padded", 10**6, 16)))
    learner = PolicyGradient(policy, Reinforce(0.2), None, 0.0)
    [minibatch], _ = learner.minibatches([[0]], [scored], penalised([scored], PENALTY), [measured], BETA)
    assert learner.weight(minibatch) == DRAWS
    models[0].zero_grad()
    learner.update(minibatch, DRAWS, lambda peak: peak, BETA)
    found = torch.cat([-parameter.grad.flatten() for parameter in parameters])
    away = (found @ direction - exact.norm()).item()
    assert abs(away) < 3 * error < 0.1 * exact.norm().item()
    assert torch.cosine_similarity(found, exact, dim=0) > 0.99
