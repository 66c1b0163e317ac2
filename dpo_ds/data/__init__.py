"""Preference data: files or the Hub -> tokenised pairs on disk (`prepare`) -> batches (`batching`)."""

from dpo_ds.data.census import format_census
from dpo_ds.data.dataset import GroupDataset
from dpo_ds.data.preparation import prepare

__all__ = ["GroupDataset", "format_census", "prepare"]
