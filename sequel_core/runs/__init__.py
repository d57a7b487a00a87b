"""Runs: the orchestrator, the learner protocol, checkpoints, results, metrics and loggers."""
