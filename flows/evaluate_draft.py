"""Measure a draft: `python -m flows.evaluate_draft [PRESET] [section.key=value …]`."""

from flows.chain import stage_flow
from flows.terminal import main

evaluate_draft = stage_flow(
    "evaluate-draft", "evaluation", "The report on a draft, after whatever comes before and is not finished."
)

if __name__ == "__main__":
    main(evaluate_draft)
