"""One file per stage: each wraps one hass_core call with retries, progress, a summary and an MLflow run."""
