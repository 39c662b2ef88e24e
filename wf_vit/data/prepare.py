"""The task ``prepare``: a data set is downloaded and written in the form that is read.

It stands for ``tfds build``, which needs Apache Beam even for data sets that do not
use it.
"""

import logging
import re
import shutil
from pathlib import Path

import ml_collections
from tensorflow_datasets.core.download import download_manager

from wf_vit.data.digits import prepared_builder
from wf_vit.data.folder_source import open_folder
from wf_vit.data.tensorflow import tf, tfds
from wf_vit.data.tfds_source import (
    builder_source,
    describe_splits,
    manual_dir,
    manual_instructions,
    open_builder,
)
from wf_vit.errors import UsageError

_LOG = logging.getLogger(__name__)

# TFDS prepares ImageNet from whatever is there, and says nothing of a missing split.
_IMAGENET_FILE = re.compile(r"ILSVRC2012_img_(?:train|val)\.tar")
_GIB = 2**30


def prepare(config: ml_collections.ConfigDict, workdir: Path | None = None) -> None:
    """Prepares ``config.data``; what is already prepared is left as it is.

    After an interruption, what was downloaded is kept, and the writing starts again.

    Args:
      config: of any task that reads a data set; ``config.data.name`` and
        ``config.data.data_dir`` (see ``wf_vit.data.config``) are used.
      workdir: every task gets one; this one does not use it.

    Raises:
      UsageError: the data set is unknown, or no image classification set; files that
        must be downloaded by hand are missing; there is no room; or the download
        failed. The message says what to do.
    """
    del workdir
    name, data_dir = config.data.name, config.data.data_dir
    if name == "folder":
        source = open_folder(data_dir)
        _LOG.info(
            "The folder %s, of %d classes, is read as it is: nothing to prepare.",
            data_dir,
            len(source.class_names),
        )
        return
    if name == "digits":
        builder = prepared_builder(data_dir)
        _LOG.info("'digits' comes with scikit-learn: nothing to download.")
    else:
        builder = open_builder(name, data_dir)
        builder_source(builder)  # Fails before the download if it cannot be used.
        if not builder.is_prepared():
            _check_room(builder, _check_manual_files(builder))
            _download_and_prepare(builder)
    _LOG.info("Prepared in %s: %s.", builder.data_dir, describe_splits(builder))


def _check_manual_files(builder: tfds.core.DatasetBuilder) -> int:
    """Returns the bytes of the files that were downloaded by hand, if any are needed.

    Raises:
      UsageError: some are missing.
    """
    instructions = manual_instructions(builder)
    if not instructions:
        return 0
    folder = manual_dir(builder)
    present = tf.io.gfile.listdir(folder) if tf.io.gfile.isdir(folder) else []
    needed = sorted(set(_IMAGENET_FILE.findall(instructions)))
    missing = [file for file in needed if file not in present]
    if missing or not present:
        listing = "\n  ".join(missing or ["(any of its files)"])
        raise UsageError(
            f"Data set {builder.name!r} needs files that must be downloaded by hand. "
            f"These are missing in {folder}:\n  {listing}\n"
            f"TFDS says: {instructions}\n"
            "Put them there, without unpacking them, and repeat this command."
        )
    paths = (f"{folder}/{file}" for file in needed)
    return sum(tf.io.gfile.stat(path).length for path in paths)


def _check_room(builder: tfds.core.DatasetBuilder, manual_bytes: int) -> None:
    """Says how much room there is and how much is needed, as far as it is known.

    Raises:
      UsageError: the files on hand do not fit a second time.
    """
    root = builder.data_dir_root
    if manual_bytes:
        size = f"about {manual_bytes / _GIB:.1f} GiB, the size of its archives"
    else:
        # Data sets without a file of checksums do not say.
        sizes = [info.size for info in (builder.url_infos or {}).values()]
        size = (
            f"a download of up to {sum(sizes) / _GIB:.2f} GiB, and about as much again"
            if sizes
            else "a download of unknown size"
        )
    if "://" in str(root):
        _LOG.info("%s needs %s in %s.", builder.name, size, root)
        return
    folder = Path(root).expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    room = f"{root} has {free / _GIB:.1f} GiB free"
    if free < manual_bytes:
        raise UsageError(
            f"Data set {builder.name!r} needs {size}, but {room}: make room there, or "
            "set config.data.data_dir to a folder on a larger disk."
        )
    _LOG.info("%s needs %s; %s.", builder.name, size, room)


def _download_and_prepare(builder: tfds.core.DatasetBuilder) -> None:
    """Runs TFDS, which shows its progress.

    Raises:
      UsageError: it fails.
    """
    config = tfds.download.DownloadConfig(
        manual_dir=manual_dir(builder), try_download_gcs=False
    )
    failures = (
        AssertionError,
        ImportError,
        OSError,
        ValueError,
        tfds.download.DownloadError,
        download_manager.NonMatchingChecksumError,
    )
    try:
        builder.download_and_prepare(download_config=config)
    except failures as error:
        raise UsageError(
            f"Data set {builder.name!r} could not be prepared in "
            f"{builder.data_dir_root}: {type(error).__name__}: {error}\n"
            "Correct this and repeat the command; finished downloads are kept."
        ) from error
