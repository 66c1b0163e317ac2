"""Scoring functions and judges as a user would write them, right ones and wrong ones."""


def vowels(prompts, completions):
    """The share of vowels."""
    return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in completions]


def nothing(prompts, completions):
    return [float("nan")] * len(completions)


def longer(prompts, first, second):
    """A judge without a side."""
    return [0.5 + 0.5 * ((len(a) > len(b)) - (len(a) < len(b))) for a, b in zip(first, second, strict=True)]


def first_one(prompts, first, second):
    """A judge who looks at the place alone."""
    return [1.0] * len(first)


def out_of_range(prompts, first, second):
    return [2.0] * len(first)


def broken(prompts, first, second):
    raise KeyError("no such judge")
