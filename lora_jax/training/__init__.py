"""Train and eval steps over a mesh of devices: state in, state out, nothing kept."""

from ._mesh import (
    check_batch as check_batch,
    data_mesh as data_mesh,
    replicate as replicate,
    shard_batch as shard_batch,
)
from ._steps import (
    StepKeys as StepKeys,
    TrainState as TrainState,
    init_state as init_state,
    make_eval_step as make_eval_step,
    make_train_step as make_train_step,
    step_keys as step_keys,
)
