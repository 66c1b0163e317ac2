"""Completions by vLLM, where it is installed: one process, all GPUs; the same call as models.generation.Generator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from dpo_ds.config import GenerationSection, ModelSection
from dpo_ds.models.adapters import folder_of
from dpo_ds.models.generation import Completion, as_completions, stop_tokens


class VllmGenerator:
    """precision: {"bf16": {"enabled": ...}}. Seeds come from (seed, row) as there, but give other completions."""

    def __init__(self, section: ModelSection, precision: dict, tokenizer: Any, settings: GenerationSection):
        from vllm import LLM

        self.tokenizer, self.settings = tokenizer, settings
        self.report: Callable[[int, int], None] = lambda tokens, completions: None
        self._llm = LLM(
            model=folder_of(section.path),
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
            dtype="bfloat16" if precision["bf16"]["enabled"] else "float32",
            tensor_parallel_size=max(1, torch.cuda.device_count()),
            generation_config="vllm",  # none of the model folder's own sampling settings
        )
        try:
            named = GenerationConfig.from_pretrained(folder_of(section.path), revision=section.revision)
        except OSError:  # a folder without generation_config.json
            named = GenerationConfig()
        self.stops = stop_tokens(named, tokenizer)

    def __call__(self, prompts: Sequence[np.ndarray], n: int, first_row: int = 0) -> list[list[Completion]]:
        from vllm import SamplingParams

        settings = self.settings
        options = [
            SamplingParams(
                n=n,
                temperature=settings.temperature,
                top_k=settings.top_k or -1,
                top_p=settings.top_p,
                min_tokens=settings.min_new_tokens,
                max_tokens=settings.max_new_tokens,
                stop_token_ids=self.stops,
                seed=int(np.random.SeedSequence([settings.seed, first_row + row]).generate_state(1)[0]),
            )
            for row in range(len(prompts))
        ]
        answers = self._llm.generate([{"prompt_token_ids": ids.tolist()} for ids in prompts], options, use_tqdm=False)
        drawn = [[np.array(one.token_ids, dtype=np.int64) for one in answer.outputs] for answer in answers]
        self.report(sum(len(ids) for own in drawn for ids in own), sum(map(len, drawn)))
        return [as_completions(self.tokenizer, self.stops, *own) for own in zip(prompts, drawn, strict=True)]
