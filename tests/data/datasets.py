"""A data set, opened as the tasks open it."""

from wf_vit.data.config import DataConfig
from wf_vit.data.pipeline import open_dataset


def dataset_of(config):
    return open_dataset(DataConfig.of(config))
