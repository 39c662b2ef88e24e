"""Which files of a folder are images: one answer for training and for ``explain``."""

import collections
import os
from collections.abc import Callable, Container, Iterable
from typing import NamedTuple

# What is taken for an image in a folder, whatever the case.
SUFFIXES = (
    ".avif",
    ".bmp",
    ".gif",
    ".jfif",
    ".jp2",
    ".jpe",
    ".jpeg",
    ".jpg",
    ".png",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
)


class Entry(NamedTuple):
    """What a folder holds.

    Attributes:
      name: of the entry.
      is_folder: whether it is a folder, or a link to one, whatever its name.
      is_link: whether it is a link.
      leads_nowhere: whether it is a link to what is not there, or to itself.
    """

    name: str
    is_folder: bool
    is_link: bool
    leads_nowhere: bool = False


class Found(NamedTuple):
    """The images below a folder.

    Attributes:
      images: their paths, relative to the folder, with "/" between names; sorted.
      lost: likewise, links that lead nowhere, named like images or folders.
      left_out: how many entries are left out, by the reason.
    """

    images: list[str]
    lost: list[str]
    left_out: collections.Counter[str]


def find_images(
    root: str,
    *,
    entries: Callable[[str], Iterable[Entry]] | None = None,
    leave_out: Container[str] = (),
) -> Found:
    """Lists the images of a folder and of the folders in it.

    Links to folders are followed, but no folder is read twice: not if several links
    lead to it, and not if a link leads back to where it lies. Hidden files and folders
    are left out, and files that do not end in one of ``SUFFIXES``.

    Args:
      root: the folder.
      entries: lists a folder; None: one of this machine.
      leave_out: folders that are not looked into.
    """
    entries = local_entries if entries is None else entries
    images: list[str] = []
    lost: list[str] = []
    left_out: collections.Counter[str] = collections.Counter()
    read = {os.path.realpath(root)}
    links: list[str] = []

    def look_into(start: str) -> None:
        waiting = [start]
        while waiting:
            folder = waiting.pop()
            try:
                here = sorted(entries(_join(root, folder)))
            except PermissionError:
                left_out["folder that may not be read"] += 1
                continue
            for entry in here:
                path = _join(folder, entry.name)
                reason = reason_to_leave_out(entry)
                if _join(root, path) in leave_out:
                    left_out["folder of results"] += 1
                elif is_lost(entry):
                    lost.append(path)
                elif reason:
                    left_out[reason] += 1
                elif not entry.is_folder:
                    images.append(path)
                elif entry.is_link:
                    links.append(path)
                else:
                    read.add(os.path.realpath(_join(root, path)))
                    waiting.append(path)

    look_into("")
    # Last, so that images have the paths at which they lie, where there are any.
    while links:
        link = links.pop(0)
        real = os.path.realpath(_join(root, link))
        here = os.path.realpath(os.path.dirname(_join(root, link)))
        if real in leave_out:
            left_out["folder of results"] += 1
        elif real in read or _holds(real, here):
            left_out["link to a folder that is read already"] += 1
        else:
            read.add(real)
            look_into(link)
    return Found(sorted(images), sorted(lost), left_out)


def local_entries(folder: str) -> list[Entry]:
    """Lists a folder of this machine; a link that leads nowhere is a file."""
    with os.scandir(folder) as found:
        return [_local_entry(entry) for entry in found]


def _local_entry(entry: os.DirEntry) -> Entry:
    is_link = entry.is_symlink()
    # `is_dir` raises if a link leads to itself.
    nowhere = is_link and not os.path.exists(entry.path)
    return Entry(entry.name, not nowhere and entry.is_dir(), is_link, nowhere)


def left_out_text(left_out: collections.Counter[str]) -> str:
    """Returns what is left out as text: "3 (2 .txt, 1 hidden)"; "nothing"."""
    if not left_out.total():
        return "nothing"
    parts = ", ".join(f"{count} {reason}" for reason, count in left_out.most_common())
    return f"{left_out.total()} ({parts})"


def reason_to_leave_out(entry: Entry) -> str:
    """Returns why an entry is left out; '' if it is not."""
    if entry.name.startswith("."):
        return "hidden"
    if entry.is_folder or entry.name.lower().endswith(SUFFIXES):
        return ""
    return os.path.splitext(entry.name)[1].lower() or "without a suffix"


def is_lost(entry: Entry) -> bool:
    """Says whether an image or a folder was here: a link that leads nowhere now."""
    suffix = os.path.splitext(entry.name)[1].lower()
    hidden = entry.name.startswith(".")
    return entry.leads_nowhere and not hidden and suffix in ("", *SUFFIXES)


def _holds(folder: str, other: str) -> bool:
    """Says whether a folder is another one, or holds it."""
    return os.path.join(other, "").startswith(os.path.join(folder, ""))


def _join(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}" if folder and name else folder or name
