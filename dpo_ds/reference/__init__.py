"""The frozen reference π_ref: where its log-probs come from."""
