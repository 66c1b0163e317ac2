"""What tests name as sample.score, importable by ranks as tests.scoring_functions."""

import os
import signal
import time


def vowels(prompts, completions):
    return [sum(text.count(vowel) for vowel in "aeiou") for text in completions]


def nan(prompts, completions):
    return [float("nan")] * len(completions)


def same(prompts, completions):
    return [1] * len(completions)


def waits_on_rank_1(prompts, completions):
    while os.environ["RANK"] == "1":
        time.sleep(1)
    return vowels(prompts, completions)


def deaf_on_rank_1(prompts, completions):
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    return waits_on_rank_1(prompts, completions)


def closes_on_rank_1(prompts, completions):
    if os.environ["RANK"] == "1":
        os.close(1)
        os.close(2)
    return vowels(prompts, completions)


def forks_on_rank_1(prompts, completions):
    if os.environ["RANK"] == "1":
        os.fork()
    return vowels(prompts, completions)
