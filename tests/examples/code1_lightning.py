"""EWC on SplitDigits in PyTorch: Code 1 of the SequeL paper (https://arxiv.org/abs/2304.10857)."""

from functools import partial

from torch.optim import SGD

from sequel_benchmarks import SplitDigits
from sequel_core import EWCHParams, TrainingHParams, run
from sequel_lightning import MLP, make_learner

benchmark = SplitDigits(num_tasks=5)
model = MLP(widths=[200], num_classes=10, image_shape=benchmark.image_shape)
optimizer = partial(SGD, lr=0.1)
algo = EWCHParams(ewc_lambda=1, lr_decay=0.8)
training = TrainingHParams(batch_size=10, epochs_per_task=1)
learner = make_learner(algo, model, optimizer, benchmark, training)
result = run(learner, benchmark)
