"""EWC on SplitDigits in JAX: Code 1 of the SequeL paper (https://arxiv.org/abs/2304.10857)."""

import optax

from sequel_benchmarks import SplitDigits
from sequel_core import EWCHParams, TrainingHParams, run
from sequel_flax import MLP, make_learner

benchmark = SplitDigits(num_tasks=5)
model = MLP(widths=[200], num_classes=10)
optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
algo = EWCHParams(ewc_lambda=1, lr_decay=0.8)
training = TrainingHParams(batch_size=10, epochs_per_task=1)
learner = make_learner(algo, model, optimizer, benchmark, training)
result = run(learner, benchmark)
