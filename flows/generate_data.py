"""Make the training data: `python -m flows.generate_data [PRESET] [section.key=value …]`."""

from flows.chain import stage_flow
from flows.terminal import main

generate_data = stage_flow("generate-data", "responses", "Prompts and the target's answers to them.")

if __name__ == "__main__":
    main(generate_data)
