"""Hydra groups, and experiments with published numbers; installed as `sequel_configs`."""
