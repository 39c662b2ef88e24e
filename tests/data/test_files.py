"""Which files are images: the same answer for training and for ``explain``."""

import logging
import os

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from wf_vit.data import files, folder_source
from wf_vit.explanation import images

# What a class folder may hold, and which of it is used.
TREE = {
    "1.jpg": True,
    "2.JPEG": True,
    "3.webp": True,
    "4.jfif": True,
    "5.jpe": True,
    "6.tif": True,
    "sub/1.jpg": True,
    "sub/deeper/2.png": True,
    "notes.txt": False,
    "sub/more.txt": False,
    "README": False,
    ".hidden.jpg": False,
    ".cache/1.jpg": False,
    "sub/.hidden.png": False,
}
USED = sorted(name for name, used in TREE.items() if used)


def write(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = tf.io.encode_jpeg(np.full((4, 6, 3), 100, np.uint8)).numpy()
    path.write_bytes(buffer)


def write_tree(folder):
    for name in TREE:
        write(folder / name)


def used_for_training(root, split="train"):
    source = folder_source.open_folder(str(root))
    records = source.read(split, None).map(source.load)
    return sorted(record["id"].decode() for record in records.as_numpy_iterator())


def used_by_explain(root):
    found = images.find(str(root), leave_out=root / "results")
    return sorted(str(source.path.relative_to(root)) for source in found)


def below(folder, names=USED):
    return sorted(f"{folder}/{name}" for name in names)


@pytest.mark.parametrize("used", [used_for_training, used_by_explain])
def test_images_at_any_depth_are_used_and_the_rest_is_counted(tmp_path, used, caplog):
    write_tree(tmp_path / "cat")
    write_tree(tmp_path / "dog")
    with caplog.at_level(logging.INFO):
        assert used(tmp_path) == below("cat") + below("dog")
    (message,) = (r.getMessage() for r in caplog.records if "left out" in r.msg)
    assert message.startswith("Used 16 images")
    assert message.endswith("left out: 12 (6 hidden, 4 .txt, 2 without a suffix).")


@pytest.mark.parametrize("used", [used_for_training, used_by_explain])
def test_links_are_followed_and_no_folder_is_read_twice(tmp_path, used, caplog):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    write(root / "cat" / "1.jpg")
    write(root / "dog" / "sub" / "1.jpg")
    write(elsewhere / "2.jpg")
    (root / "cat" / "file.jpg").symlink_to(elsewhere / "2.jpg")
    (root / "cat" / "a_link").symlink_to(elsewhere)  # to another place
    (elsewhere / "circle").symlink_to(root / "cat")  # back to where it came from
    (root / "dog" / "again").symlink_to(root / "dog" / "sub")  # to what is there
    (root / "dog" / "up").symlink_to(root)  # to what holds it
    with caplog.at_level(logging.INFO):
        got = used(root)
    assert got == ["cat/1.jpg", "cat/a_link/2.jpg", "cat/file.jpg", "dog/sub/1.jpg"]
    assert "left out: 3 (3 link to a folder that is read already)" in caplog.text


def test_a_class_may_be_a_link(tmp_path):
    write(tmp_path / "elsewhere" / "1.jpg")
    root = tmp_path / "root"
    write(root / "cat" / "1.jpg")
    (root / "dog").symlink_to(tmp_path / "elsewhere")
    assert (
        used_for_training(root)
        == used_by_explain(root)
        == [
            "cat/1.jpg",
            "dog/1.jpg",
        ]
    )


def test_results_are_no_images(tmp_path, caplog):
    write(tmp_path / "1.jpg")
    write(tmp_path / "results" / "2.jpg")
    (tmp_path / "link").symlink_to(tmp_path / "results")
    with caplog.at_level(logging.INFO):
        assert used_by_explain(tmp_path) == ["1.jpg"]
    assert "left out: 2 (2 folder of results)" in caplog.text


@pytest.mark.parametrize("stray", [None, "train/preview.jpg", "preview.jpg"])
def test_splits_are_splits_whatever_lies_beside_the_classes(tmp_path, stray, caplog):
    for split in ("train", "val"):
        write(tmp_path / split / "cat" / "tabby" / "1.jpg")
        write(tmp_path / split / "dog" / "1.jpg")
    if stray:
        write(tmp_path / stray)
    with caplog.at_level(logging.INFO):
        source = folder_source.open_folder(str(tmp_path))
    assert source.class_names == ("cat", "dog")
    expected = ["train/cat/tabby/1.jpg", "train/dog/1.jpg"]
    assert used_for_training(tmp_path) == expected
    left_out = "1 (1 outside of a class)" if stray else "nothing"
    assert f"Used 4 images of 2 classes in {tmp_path}; left out: {left_out}." in [
        record.getMessage() for record in caplog.records
    ]


def test_classes_may_have_the_names_of_splits(tmp_path):
    for name in ("test", "train"):
        write(tmp_path / name / "1.jpg")
    assert folder_source.open_folder(str(tmp_path)).class_names == ("test", "train")


def test_a_folder_elsewhere_is_read_like_one_here(tmp_path, monkeypatch):
    """gs:// marks folders with a slash, and to ask it of every file would be slow."""
    write_tree(tmp_path / "cat")
    here = "mem://bucket"
    asked = []

    def local(path):
        return path.replace(here, str(tmp_path))

    def listdir(path):
        with os.scandir(local(path)) as found:
            return [entry.name + "/" * entry.is_dir() for entry in found]

    def isdir(path):
        asked.append(path)
        return os.path.isdir(local(path))

    monkeypatch.setattr(tf.io.gfile, "listdir", listdir)
    monkeypatch.setattr(tf.io.gfile, "isdir", isdir)
    source = folder_source.open_folder(here)
    assert source.count("train") == len(USED)
    assert not [path for path in asked if path.lower().endswith(files.SUFFIXES)]


def test_names_that_are_no_text_are_read(tmp_path):
    write(tmp_path / "cat" / os.fsdecode(b"caf\xe9.jpg"))
    source = folder_source.open_folder(str(tmp_path))
    (record,) = source.read("train", None).map(source.load).as_numpy_iterator()
    assert record["id"] == b"cat/caf\xe9.jpg"


@pytest.mark.parametrize("suffix", files.SUFFIXES)
def test_every_suffix_is_one_that_can_be_read(suffix):
    Image.init()
    if suffix == ".avif" and suffix not in Image.EXTENSION:
        pytest.skip("This Pillow has no AVIF.")
    assert Image.EXTENSION[suffix] in Image.OPEN
