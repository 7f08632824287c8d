"""Make the features: `python -m flows.extract_features [PRESET] [section.key=value …]`."""

from flows.chain import stage_flow
from flows.terminal import main

extract_features = stage_flow(
    "extract-features",
    "features",
    "The target's hidden states over its answers, after whatever comes before and is not finished.",
)

if __name__ == "__main__":
    main(extract_features)
