"""Lets the tests import torchvision, their oracle, beside any PyTorch build."""

import sequel_lightning._torchvision  # noqa: F401
