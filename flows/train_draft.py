"""Train a draft: `python -m flows.train_draft [PRESET] [section.key=value …]`."""

from flows.chain import stage_flow
from flows.terminal import main

train_draft = stage_flow("train-draft", "draft", "A trained draft.")

if __name__ == "__main__":
    main(train_draft)
