"""The settings of a training run, with their defaults."""

import ml_collections
from ml_collections import config_dict

from wf_vit.data.config import default_config as default_data
from wf_vit.models import registry

UNITS = ("steps", "epochs", "percent")


def default_config(model: str, variant: str) -> ml_collections.ConfigDict:
    """Returns a whole experiment's config; every key can be overridden.

    A duration ``name`` has three keys, ``name_steps``, ``name_epochs`` and
    ``name_percent`` (of the whole run). The finest that is set counts, so that an
    override of ``warmup_steps`` wins over a config's ``warmup_epochs``. They are
    resolved when the run starts (``wf_vit.train.optimizer.durations``).
    """
    config = ml_collections.ConfigDict()
    config.task = "train"  # or "evaluate"
    config.seed = 0
    config.data = default_data()
    config.model = registry.default_config(model, variant)

    # A checkpoint to start from: whatever wf_vit.models.pretrained.load opens. The
    # architecture is then the checkpoint's; of config.model, the name, the fields,
    # drop_path, dtype and remat count.
    config.init_from = ""
    # "evaluate" only: which checkpoint of the workdir, "best" or "last".
    config.evaluate_checkpoint = "best"

    config.batch_size = 1024  # over all devices of all processes
    config.eval_batch_size = 1024
    set_duration(config, "total", epochs=90)

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.learning_rate = 1e-3
    set_duration(config, "warmup", percent=5)
    # Decoupled (AdamW): a step subtracts learning rate * decay * kernel. Kernels only.
    config.optimizer.weight_decay = 0.1
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.clip_norm = 1.0  # of the global gradient; 0: no clipping
    # The rate of block l of L is multiplied by layer_decay ** (L - l), that of the
    # embedding by layer_decay ** (L + 1); that of the head is the full one.
    config.optimizer.layer_decay = 1.0
    # The rate of the fields, of all layers, is that of the head times this.
    config.optimizer.fields_rate = 1.0
    # Micro-batches per step, to fit a batch into memory. Same gradient, less memory.
    config.accumulate_steps = 1
    config.label_smoothing = 0.0
    # Exponential moving average of the parameters, which is then what is evaluated
    # and exported; 0: none.
    config.ema_decay = 0.0

    # An indicator teaches the model where to look (wf_vit.train.guidance), for a
    # while: the weight falls linearly to 0 over the duration. 0: no guidance. To match
    # fields takes more than to match attention, some 100 (results/finetune): a mean
    # over layers, heads and patches moves a single field less than the task does.
    config.guidance = ml_collections.ConfigDict()
    config.guidance.weight = 0.0
    set_duration(config, "guidance", percent=100)
    # What of the model is to match the indicator: its 'attention', or its 'fields',
    # which should cover it with little area.
    config.guidance.match = "attention"
    # Each head learns from the teacher's of the same index, so there must be as many;
    # False: the mean over heads learns from the indicator fused over them.
    config.guidance.per_head = True
    # To match fields: an interaction is worth covering if it has more than this times
    # the even share of its row; so it should be 1 or more.
    config.guidance.area_weight = 1.0
    # Whatever wf_vit.models.pretrained.load opens. '': the indicator needs none, or,
    # to match fields, the area term acts alone.
    config.guidance.teacher = ""
    # 'mean', 'max', 'std', 'odds', 'knockout' or 'propagated'; without a teacher, as
    # controls, 'distance' or 'random'.
    config.guidance.indicator = "mean"
    config.guidance.num_probes = 4  # of the propagated indicator
    # Side in pixels at which the teacher sees the images; unset: its own.
    config.guidance.image_size = config_dict.placeholder(int)
    config.guidance.dtype = "bfloat16"  # of the teacher

    set_duration(config, "log", steps=50)
    set_duration(config, "eval", epochs=5)
    set_duration(config, "checkpoint", steps=1000)
    config.profile = False  # trace steps for TensorBoard's profiler

    # Multi-host set-up; it is detected on TPU pods and under Slurm or Open MPI.
    config.distributed = ml_collections.ConfigDict()
    config.distributed.coordinator_address = config_dict.placeholder(str)
    config.distributed.num_processes = config_dict.placeholder(int)
    config.distributed.process_id = config_dict.placeholder(int)
    return config


def set_duration(
    config: ml_collections.ConfigDict,
    name: str,
    *,
    steps: int | None = None,
    epochs: float | int | None = None,
    percent: float | int | None = None,
) -> None:
    """Declares the three keys of a duration and sets those that are given."""
    for unit, value in zip(UNITS, (steps, epochs, percent), strict=True):
        kind = int if unit == "steps" else float
        config[f"{name}_{unit}"] = config_dict.placeholder(kind)
        if value is not None:
            config[f"{name}_{unit}"] = kind(value)
