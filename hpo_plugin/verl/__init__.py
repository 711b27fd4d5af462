"""The adapter to verl: registration, config checks, presets, metrics. verl imports its modules when it needs them."""
