"""A prediction among the classes of the sample's task is never worse than one among all classes."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sequel_flax.bundle import mask_logits as flax_mask
from sequel_lightning.preprocessing import mask_logits as torch_mask

CLASSES = 6
FLOATS = st.floats(-1e6, 1e6, width=32)


@given(
    logits=arrays(np.float32, (5, CLASSES), elements=FLOATS),
    mask=arrays(np.bool_, (5, CLASSES)),
    labels=arrays(np.int64, 5, elements=st.integers(0, CLASSES - 1)),
)
def test_masked_accuracy_is_never_below_unmasked(
    logits: np.ndarray, mask: np.ndarray, labels: np.ndarray
) -> None:
    mask[np.arange(5), labels] = True  # a sample's label is of its task
    ours = np.asarray(flax_mask(jnp.asarray(logits), jnp.asarray(mask)))
    theirs = torch_mask(torch.from_numpy(logits), torch.from_numpy(mask)).numpy()
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(ours[mask], logits[mask])
    assert (ours[~mask] == np.finfo(np.float32).min).all()
    hit, masked_hit = (a.argmax(-1) == labels for a in (logits, ours))
    assert (masked_hit >= hit).all()
