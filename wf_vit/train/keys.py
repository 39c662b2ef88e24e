"""The settings of a training run: every key, its default, its range and its meaning."""

from wf_vit import measure, settings
from wf_vit.data import config as data
from wf_vit.models import registry
from wf_vit.models.checks import MOST_PIXELS
from wf_vit.settings import LARGEST_COUNT, LARGEST_SEED, Setting, duration
from wf_vit.train.guidance import MATCHES
from wf_vit.train.optimizer import OptimizerConfig

_TASKS = ("train", "evaluate", "prepare")

KEYS = {
    "task": Setting("train", "what is done", choices=_TASKS),
    "seed": Setting(0, "of all that is random", low=0, high=LARGEST_SEED),
    "data": data.KEYS,
    "model": registry.KEYS,
    "init_from": Setting(
        "",
        "a checkpoint to start from, whatever wf_vit.models.pretrained.load opens; its "
        "architecture is used, and of model.* only name, fields, drop_path, dtype and "
        "remat have an effect",
    ),
    "evaluate_checkpoint": Setting(
        "best",
        "checkpoint of the workdir that the task evaluate takes",
        choices=("best", "last"),
    ),
    "best_split": Setting(
        "",
        "name in data.eval of the evaluation whose top-1 chooses the best checkpoint; "
        "empty: the only one, or the first in alphabetical order",
    ),
    "batch_size": Setting(
        1024, "images of a step, over all devices of all processes", low=1, high=10**7
    ),
    "eval_batch_size": Setting(
        1024, "images at once in an evaluation, over all devices", low=1, high=10**7
    ),
    **duration("total", "length of the run", epochs=90),
    "optimizer": settings.of(OptimizerConfig),
    **duration("warmup", "length of the warm-up", percent=5, low=0),
    "accumulate_steps": Setting(
        1,
        "parts of a batch that follow one another, to fit it into memory; the gradient "
        "is the same",
        low=1,
        high=10**6,
    ),
    "label_smoothing": Setting(
        0.0, "share of a label that is spread over all classes", low=0, below=1
    ),
    "ema_decay": Setting(
        0.0,
        "decay of the moving average of the parameters, which is then what is "
        "evaluated and exported; 0: no average",
        low=0,
        below=1,
    ),
    "guidance": {
        # To match fields takes some 100 (results/finetune): a mean over layers, heads
        # and patches moves a single field less than the task does.
        "weight": Setting(
            0.0,
            "weight of the indicator that teaches the model where to look, falling to "
            "0 over the guidance; 0: no guidance",
            low=0,
            high=1e9,
        ),
        "match": Setting(
            "attention",
            "what of the model is to match the indicator; fields cover it with little "
            "area",
            choices=MATCHES,
        ),
        "per_head": Setting(
            True,
            "whether each head learns from the teacher's of its index, and not the "
            "mean from the indicator fused over heads",
        ),
        "area_weight": Setting(
            1.0,
            "of match=fields: to cover an interaction pays if its share of the row is "
            "more than this many times the even share, 1 / P; it should be 1 or more",
            low=0,
            high=1e9,
        ),
        "teacher": Setting(
            "",
            "checkpoint of the teacher; empty where the indicator needs none, or for "
            "the area alone",
        ),
        "indicator": Setting(
            "mean",
            "what is matched; without a teacher, as controls, distance or random",
            choices=tuple(measure.INDICATORS),
        ),
        "num_probes": Setting(4, "of the propagated indicator", low=2, high=10**4),
        "image_size": Setting(
            None,
            "side in pixels at which the teacher sees the images, if not its own",
            kind=int,
            low=1,
            high=MOST_PIXELS,
        ),
        "dtype": Setting("bfloat16", "of the teacher", choices=tuple(registry.DTYPES)),
    },
    **duration("guidance", "length of the guidance", percent=100),
    "max_skipped_updates": Setting(
        10,
        "updates of a run that may be skipped since they are not finite; then it stops",
        low=0,
        high=LARGEST_COUNT,
    ),
    "on_change": Setting(
        "stop",
        "what to do where a run resumes with another model or order of the data, which "
        "would spoil it",
        choices=("stop", "continue"),
    ),
    **duration("log", "between lines of metrics", steps=50),
    **duration("eval", "between evaluations", epochs=5),
    **duration("checkpoint", "between checkpoints", steps=1000),
    "profile": Setting(False, "whether steps are traced for TensorBoard's profiler"),
    "pictures": Setting(
        True,
        "whether each evaluation draws what the model does to a few images, for "
        "TensorBoard: a second or two",
    ),
    # Detected on TPU pods and under Slurm or Open MPI.
    "distributed": {
        "coordinator_address": Setting(
            None, "host:port of the first process", kind=str
        ),
        "num_processes": Setting(
            None, "of the run", kind=int, low=1, high=LARGEST_COUNT
        ),
        "process_id": Setting(
            None, "of this process, from 0", kind=int, low=0, high=LARGEST_COUNT
        ),
        "peer_timeout_seconds": Setting(
            60.0,
            "after which a process that gives no sign of life counts as gone, and the "
            "others end too",
            above=0,
            high=LARGEST_COUNT,
        ),
    },
}
