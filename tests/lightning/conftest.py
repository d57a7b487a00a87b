"""Lets the tests import Lightning, which imports torchvision, beside any PyTorch build."""

import sequel_lightning._torchvision  # noqa: F401
