"""The frozen model to be made faster: loading it and capturing its hidden states."""
