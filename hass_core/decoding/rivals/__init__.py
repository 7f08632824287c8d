"""Other ways to decode several tokens a pass, under the same interface and over the same runner, to compare with."""
