"""The registered model's code: MLflow runs this file to turn the packed draft into a `predict` function.

mlflow.pyfunc.load_model("models:/hass-draft-smollm2-135m@champion").predict(["Tell me about tides."])
"""

import json
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext


class ServedDraft(PythonModel):
    """Loads the target named in `served.json`, checks that the draft is its own, and decodes with it."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load target and draft. Raises DraftMismatch when the target has changed since training."""
        from hass_core.config import TargetConfig, TreeConfig
        from hass_core.decoding.decoder import SpeculativeDecoder
        from hass_core.draft_model.checkpoint import load_draft
        from hass_core.target_model.loader import load_target
        from hass_core.target_model.runner import make_runner

        folder = Path(context.artifacts["draft"])
        served = json.loads((folder / "served.json").read_text())
        self.target = load_target(TargetConfig(**served["target"]))
        draft = load_draft(folder, self.target)
        self.decoder = SpeculativeDecoder(make_runner(self.target), draft, TreeConfig(**served["tree"]))

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[str]:
        """One answer per prompt."""
        from hass_core.config import SamplingConfig
        from hass_core.data.templates import encode_prompt
        from hass_core.decoding.answers import StopRule

        options, tokenizer = params or {}, self.target.tokenizer
        prompts = [encode_prompt(tokenizer, [{"role": "user", "content": text}]) for text in model_input.iloc[:, 0]]
        sampling = SamplingConfig(temperature=options.get("temperature", 0.0))
        answers = self.decoder.generate(prompts, sampling, options.get("max_new_tokens", 128), StopRule.of(self.target))
        return [str(tokenizer.decode(answer.token_ids, skip_special_tokens=True)) for answer in answers]


set_model(ServedDraft())
