"""The feature store: the target's hidden states as Parquet, one conversation a row."""
