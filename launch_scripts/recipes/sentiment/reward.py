"""The ground truth: the probability, by TF-IDF and logistic regression, that a review is positive.

Fitted on the reviews of $SENTIMENT_DATA/train.jsonl, within a second or two, wherever it is asked.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline

from launch_scripts.recipes.sentiment.corpus import texts

COMMONEST = ["the", "and", "of", "to", "is", "in", "it", "that"]  # each in more than 15 % of the movie reviews


def positive(prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:  # [n], 0 to 1
    """p(positive | prompt and completion), as `--sample.score` and `--evaluate.score` want it."""
    reviews = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    return classifier().predict_proba(reviews)[:, 1]


@cache
def classifier() -> Pipeline:
    # With the commonest words longer texts have higher scores, and every method would buy reward with length.
    words = TfidfVectorizer(
        ngram_range=(1, 2), min_df=2, sublinear_tf=True, token_pattern=r"[a-z][a-z']+", stop_words=COMMONEST
    )
    fitted = make_pipeline(words, LogisticRegression(C=10.0, max_iter=1000))
    return fitted.fit(*texts(folder() / "train.jsonl"))


def accuracy() -> float:
    """On the reviews that were held out."""
    return float(classifier().score(*texts(folder() / "held_out.jsonl")))


def folder() -> Path:
    return Path(os.environ["SENTIMENT_DATA"])
