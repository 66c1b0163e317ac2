"""Direct Preference Optimization of large language models on DeepSpeed."""

__version__ = "0.1.0"
