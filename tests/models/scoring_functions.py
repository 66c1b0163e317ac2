"""Scoring functions, good and bad, for test_scoring.py, which copies this file to where it is imported from."""

import os
import signal
import sys
import time

import numpy as np
import torch


def length(prompts, completions):
    return [len(text) for text in completions]


def tensor(prompts, completions):
    return torch.tensor([len(prompt) / 2 for prompt in prompts], dtype=torch.bfloat16)


def short(prompts, completions):
    return [0.0]


def text(prompts, completions):
    return "123"


def by_row(prompts, completions):
    return {0: 0.1, 1: 0.2, 2: 0.3}


def number(prompts, completions):
    return 3.5


def nan(prompts, completions):
    return [1.0 if text != "bad" else float("nan") for text in completions]


def huge(prompts, completions):
    return [10**400] * len(completions)


def words(prompts, completions):
    return ["good"] * len(completions)


def one_by_one(prompts, completions):
    if "bad" in completions:
        raise KeyError("no such\nreview")
    return [0.0] * len(completions)


def together(prompts, completions):
    if len(completions) > 1:
        raise ValueError("one at a time")
    return [0.0]


class Odd(list):
    def __len__(self):
        return 3


class NoLength(Odd):
    def __len__(self):
        raise KeyError("length")


class NoItems(Odd):
    def __iter__(self):
        raise KeyError("items")


class Endless(Odd):
    def __iter__(self):
        while True:
            yield 1.0


class NoNumber:
    def __float__(self):
        raise SystemExit(0)


class NoText:
    def __repr__(self):
        raise KeyError("text")


class Mute(Exception):
    def __str__(self):
        raise KeyError("text")


def no_length(prompts, completions):
    return NoLength()


def no_items(prompts, completions):
    return NoItems()


def endless(prompts, completions):
    return Endless()


def no_number(prompts, completions):
    return [NoNumber()] * 3


def no_text(prompts, completions):
    return NoText()


def mute(prompts, completions):
    raise Mute


def imaginary(prompts, completions):
    return [1.0, 2j, 0.0]


def imaginary_array(prompts, completions):
    return np.array([1, 1 + 2j, 0], np.complex64)


def imaginary_tensor(prompts, completions):
    return torch.tensor([1, 1 + 2j, 0])


def coroutine(prompts, completions):
    async def later():
        return [0.0] * 3

    return later()


async def sleeps(prompts, completions):
    return [0.0] * 3


def interrupts(prompts, completions):
    raise KeyboardInterrupt


def generator_exits(prompts, completions):
    raise GeneratorExit("bye")


def never_returns(prompts, completions):
    while True:
        time.sleep(60)


def never_returns_and_catches_all(prompts, completions):
    for _ in range(2):
        try:
            time.sleep(60)
        except BaseException:
            pass
    return [0.0] * 3


def swallows(prompts, completions):
    try:
        signalled(prompts, completions)
    except BaseException:
        return [0.0] * 3


def forks(prompts, completions):
    os.fork()
    return [0.0] * 3


def forks_and_fails(prompts, completions):
    return [0.0] * 3 if os.fork() else 1 / 0


def has_a_child(prompts, completions):
    if os.fork() == 0:
        os._exit(0)
    return [0.0] * 3


def leaves(prompts, completions):
    sys.exit("no licence")


def signalled(prompts, completions):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


constant = 3
