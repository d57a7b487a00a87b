from functools import partial
from torch.optim import SGD
from sequel_benchmarks import RotatedDigits
from sequel_core import EWCHParams
from sequel_lightning import EWC, MLP, TaskDataModule
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import (
    EarlyStopping, LearningRateMonitor)
from pytorch_lightning.loggers import TensorBoardLogger

benchmark = RotatedDigits(num_tasks=3, validation=0.1)
net = MLP([64], 10, image_shape=benchmark.image_shape)
module = EWC(
    net, partial(SGD, lr=0.1), EWCHParams(ewc_lambda=10),
    benchmark.spec)
logger = TensorBoardLogger("logs")  # its x-axis goes on
for task in benchmark.tasks:
    stop = EarlyStopping("val/accuracy", mode="max")
    trainer = Trainer(
        max_epochs=3, logger=logger,
        callbacks=[stop, LearningRateMonitor()])
    trainer.fit(module, datamodule=TaskDataModule(task))
    trainer.test(module, TaskDataModule(task))
