"""Tasks: problems, prompts and rewards behind one protocol, :class:`hpo_plugin.tasks.task.Task`.

A task imports no framework and none of the mathematics. This module imports nothing, because verl imports the reward
modules below it in each of its reward workers.
"""
