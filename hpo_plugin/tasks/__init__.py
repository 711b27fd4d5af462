"""Tasks: problems, prompts and rewards behind one protocol, :class:`hpo_plugin.tasks.task.Task`.

A task imports neither a framework nor the algorithm. This module imports nothing, because verl imports the reward
modules below it in each of its reward workers.
"""
