"""From logits to a token: what shapes the distribution, and the noise it is drawn with."""
