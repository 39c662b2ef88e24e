"""The embedded data set: scikit-learn's 1,797 real 8x8 digits, as a TFDS builder."""

import getpass
import os
import tempfile
from collections.abc import Iterator

import numpy as np

from wf_vit.data.tensorflow import tfds
from wf_vit.errors import UsageError

_HOLD_OUT = 5  # one example in five of every class is a test example


class Digits(tfds.core.GeneratorBasedBuilder):
    """UCI's handwritten digits as scikit-learn ships them, 8x8 greyscale."""

    VERSION = tfds.core.Version("1.0.0")
    # Nothing is downloaded. To look for checksums beside this file TFDS 4.9.10 needs
    # importlib_resources, which it does not declare.
    url_infos = None

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="1,797 handwritten digits, 8x8 greyscale, stored losslessly.",
            homepage="https://archive.ics.uci.edu/dataset/80",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(
                        shape=(8, 8, 1), encoding_format="png"
                    ),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        del dl_manager
        images, labels = _load()
        rank = np.empty_like(labels)
        for label in range(10):
            rank[labels == label] = np.arange(np.sum(labels == label))
        held_out = rank % _HOLD_OUT == 0
        return {
            "train": self._generate_examples(images[~held_out], labels[~held_out]),
            "test": self._generate_examples(images[held_out], labels[held_out]),
        }

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray
    ) -> Iterator[tuple[int, dict]]:
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield index, {"image": image, "label": int(label)}


def prepared_builder(data_dir: str) -> Digits:
    """Returns the builder with its records on disk, writing them if need be.

    Args:
      data_dir: where; '' is the folder TFDS uses by default. If it cannot be
        written, a folder of this user under the system's temporary one is used.

    Raises:
      UsageError: scikit-learn is missing.
    """
    try:
        return _prepare(data_dir or None)
    except OSError:
        try:
            user = getpass.getuser()
        except (KeyError, OSError):  # In a container a user may have no name.
            user = str(os.getuid())
        fallback = f"wf_vit_{user}"
        return _prepare(os.path.join(tempfile.gettempdir(), fallback))


def _prepare(data_dir: str | None) -> Digits:
    builder = Digits(data_dir=data_dir)
    if builder.is_prepared():
        return builder
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    tfds.disable_progress_bar()  # It takes a second.
    try:
        builder.download_and_prepare(download_config=config)
    except OSError:
        # Records are moved into place in one step, which fails if another process
        # did the same meanwhile.
        builder = Digits(data_dir=data_dir)
        if not builder.is_prepared():
            raise
    return builder


def _load() -> tuple[np.ndarray, np.ndarray]:
    """Returns images, uint8 ``[1797, 8, 8, 1]``, and labels, int ``[1797]``."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UsageError(
            "The data set 'digits' comes from scikit-learn, which is not installed: "
            "run `pip install 'wf-vit[demo]'`."
        ) from error
    digits = load_digits()
    # 0..16 to 0..255: distinct levels stay distinct, so nothing is lost.
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return images[..., None], digits.target
