import jax
from flax.training.train_state import TrainState
from optax import inject_hyperparams, sgd
from sequel_benchmarks import RotatedDigits
from sequel_core import Batch, EWCHParams
from sequel_core.stream.plan import epoch_batches
from sequel_flax import MLP, ewc, initial_params
from sequel_flax.hooks import ImageGrid
from sequel_flax.writers import TensorBoardWriter

benchmark = RotatedDigits(num_tasks=3)
net = MLP(widths=(64,), num_classes=10)
ts = TrainState.create(
    apply_fn=net.apply,
    params=initial_params(net, benchmark.spec, seed=0),
    tx=inject_hyperparams(sgd)(learning_rate=0.1))
algorithm = ewc(EWCHParams(ewc_lambda=10))
state = algorithm.init(ts, benchmark.spec)
train_step = jax.jit(algorithm.train_step)
writer = TensorBoardWriter("logs")  # or one of clu's
pictures = ImageGrid(every=200)

def batches(task):
    order = epoch_batches(0, task.index, 0, len(task.train), 10)
    return (Batch(*task.train.take(rows)) for rows in order)

for task in benchmark.tasks:
    ts, state = algorithm.start_task(ts, state, task)
    for batch in batches(task):
        ts, state, outputs = train_step(ts, state, batch)
        step = int(ts.step)
        if step % 50 == 0:
            loss = {"train/loss": float(outputs["loss"])}
            writer.write_scalars(step, loss)
        if pictures.due(step):
            pictures.after_step(ts, state, batch, {}, writer)
    ts, state = algorithm.end_task(ts, state, batches(task))
writer.close()
