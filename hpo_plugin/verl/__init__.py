"""The adapter to verl: registration, config and its checks, metrics. Nothing is imported before verl asks for it."""
