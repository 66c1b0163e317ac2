"""What tests name as sample.score, importable by ranks as tests.scoring_functions."""


def vowels(prompts, completions):
    return [sum(text.count(vowel) for vowel in "aeiou") for text in completions]


def nan(prompts, completions):
    return [float("nan")] * len(completions)


def same(prompts, completions):
    return [1] * len(completions)
