"""Countdown and TeleLogs on a laptop: data, a start model, a training run of verl, and a picture of it."""
