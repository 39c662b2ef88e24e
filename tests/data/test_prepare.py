"""The task ``prepare``, end to end: small archives with the layout of ImageNet's."""

import contextlib
import io
import logging
import tarfile
from collections import namedtuple

import numpy as np
import pytest
from PIL import Image

from wf_vit import command
from wf_vit.data import prepare as module
from wf_vit.data.tfds_source import open_builder, open_tfds
from wf_vit.errors import UsageError
from wf_vit.train import config as train_config

TRAIN, VALIDATION = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
CLASSES = ("n01440764", "n01443537", "n03417042", "n15075141")
IMAGES_PER_CLASS, VALIDATION_IMAGES = 15, 9


def prepare(name, data_dir):
    config = train_config.default_config("vit", "mu/4")
    config.data.name, config.data.data_dir = name, str(data_dir)
    module.prepare(config)


def jpeg(level):
    """A photograph's stand-in, whose brightness tells which one it is."""
    pixels = np.full((60, 80, 3), level, np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    return file.getvalue()


def add(archive, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def write_archives(folder):
    """The archives of the challenge: one archive a class within that of training."""
    folder.mkdir(parents=True)
    with tarfile.open(folder / TRAIN, "w") as train:
        for number, synset in enumerate(CLASSES):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as archive:
                for index in range(IMAGES_PER_CLASS):
                    content = jpeg(50 * number + index)
                    add(archive, f"{synset}_{index}.JPEG", content)
            add(train, f"{synset}.tar", inner.getvalue())
    with tarfile.open(folder / VALIDATION, "w") as validation:
        for index in range(1, VALIDATION_IMAGES + 1):
            name = f"ILSVRC2012_val_{index:08}.JPEG"
            add(validation, name, jpeg(20 * index))


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """A TFDS folder in which the small ImageNet was prepared by our command."""
    root = tmp_path_factory.mktemp("imagenet")
    write_archives(root / "downloads" / "manual")
    command.run(
        [
            "--config=windowfree:runlocal",
            "--config.task=prepare",
            f"--config.data.data_dir={root}",
        ]
    )
    return root


def examples(source, split):
    for record in source.read(split, None).map(source.load).as_numpy_iterator():
        image = np.asarray(Image.open(io.BytesIO(record["image"])), int)
        yield image.mean().round(), source.class_names[record["label"]]


def test_archives_become_examples_with_their_labels(imagenet):
    source = open_tfds("imagenet2012", str(imagenet))
    assert len(source.class_names) == 1000
    expected = {
        (50 * number + index, synset)
        for number, synset in enumerate(CLASSES)
        for index in range(IMAGES_PER_CLASS)
    }
    found = list(examples(source, "train"))
    assert len(found) == len(expected)
    assert set(found) == expected
    # The first labels of the challenge's validation set, which TFDS carries.
    validation = dict(examples(source, "validation"))
    assert len(validation) == VALIDATION_IMAGES
    assert [validation[20 * index] for index in (1, 2, 3)] == [
        "n01751748",
        "n09193705",
        "n02105855",
    ]


def test_a_step_of_the_imagenet_recipe(imagenet, tmp_path):
    from wf_vit.train import loop

    config, _ = command.parse(["--config=windowfree:runlocal"])
    config.data.data_dir = str(imagenet)
    config.data.image_size = 32
    # The tests of the configs run the whole recipe; this is about its data.
    config.data.augment.randaugment_layers = 0
    config.total_steps = config.eval_steps = config.checkpoint_steps = 2
    metrics = loop.train(config, tmp_path)
    assert set(metrics) == {
        f"{split}/{metric}"
        for split in ("minival", "validation")
        for metric in ("top1", "loss")
    }
    assert np.isfinite(list(metrics.values())).all()


def test_what_is_prepared_is_left_alone(imagenet, monkeypatch, caplog):
    monkeypatch.setattr(module, "_download_and_prepare", None)
    with caplog.at_level(logging.INFO, "wf_vit"):
        prepare("imagenet2012", imagenet)
    assert "'train' (60 examples), 'validation' (9 examples)" in caplog.text


def test_missing_archives_are_listed_with_their_folder(tmp_path):
    with pytest.raises(UsageError) as error:
        prepare("imagenet2012", tmp_path)
    folder = f"{tmp_path}/downloads/manual"
    assert f"missing in {folder}:\n  {TRAIN}\n  {VALIDATION}\n" in str(error.value)
    # TFDS would go on with the one that is there, and leave out a split.
    write_archives(tmp_path / "downloads" / "manual")
    (tmp_path / "downloads" / "manual" / TRAIN).unlink()
    with pytest.raises(UsageError, match=rf"missing in {folder}:\n  {TRAIN}\nTFDS"):
        prepare("imagenet2012", tmp_path)
    assert not (tmp_path / "imagenet2012").exists()


def test_other_sets_with_files_by_hand(tmp_path):
    with pytest.raises(UsageError, match=r"(?s)downloaded by hand.*TFDS says"):
        prepare("resisc45", tmp_path)


def test_too_small_a_disk_is_noticed_before(tmp_path, monkeypatch):
    write_archives(tmp_path / "downloads" / "manual")
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: usage(1000))
    with pytest.raises(UsageError, match=r"has 0\.0 GiB free: make room"):
        prepare("imagenet2012", tmp_path)


def test_a_failed_download_is_a_usage_error(tmp_path, monkeypatch, caplog):
    def fail(self, **kwargs):
        raise OSError("the network is down")

    builder = type(open_builder("cifar10", str(tmp_path)))
    monkeypatch.setattr(builder, "download_and_prepare", fail)
    message = r"(?s)the network is down.*repeat the command; finished downloads are"
    with (
        caplog.at_level(logging.INFO, "wf_vit"),
        pytest.raises(UsageError, match=message),
    ):
        prepare("cifar10", tmp_path)
    assert "a download of up to 0.16 GiB" in caplog.text


def test_a_set_that_does_not_say_its_size_is_prepared(tmp_path, monkeypatch, caplog):
    builder = type(open_builder("cifar10", str(tmp_path)))
    monkeypatch.setattr(builder, "url_infos", None)
    prepared = []
    monkeypatch.setattr(module, "_download_and_prepare", prepared.append)
    with caplog.at_level(logging.INFO, "wf_vit"), contextlib.suppress(UsageError):
        prepare("cifar10", tmp_path)
    assert "a download of unknown size" in caplog.text
    assert prepared


def test_sets_that_need_nothing(tmp_path, caplog):
    (tmp_path / "images" / "cat").mkdir(parents=True)
    (tmp_path / "images" / "cat" / "1.jpg").write_bytes(jpeg(9))
    with caplog.at_level(logging.INFO, "wf_vit"):
        prepare("folder", tmp_path / "images")
        prepare("digits", tmp_path)
    assert "of 1 classes, is read as it is: nothing to prepare" in caplog.text
    assert "nothing to download" in caplog.text
    assert "'test' (364 examples)" in caplog.text


def test_a_set_that_cannot_be_used_is_not_downloaded(tmp_path):
    with pytest.raises(UsageError, match="expected an image and one class label"):
        prepare("coco/2017", tmp_path)
