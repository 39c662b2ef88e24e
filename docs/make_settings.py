"""Writes docs/settings.md from the declarations of all settings.

python docs/make_settings.py
"""

from pathlib import Path

from wf_vit import command, settings
from wf_vit.train.config import default_config

PAGE = Path(__file__).with_name("settings.md")
_TASKS = {
    "train": "Training, evaluation, preparation",
    "explain": "Explaining images",
    "verify": "Verifying indicators",
    "export": "Exporting a checkpoint",
}
_TOP = """\
# Settings

`--config.KEY=VALUE` changes a setting of a config, and
`wf-vit --config=NAME --help` lists those of one config with the values that it has. A
value out of its range is refused before anything is opened. A duration has three keys,
in steps, epochs and percent of the run; the first that is set counts.

This page is written by `python docs/make_settings.py`; the declarations are in
`wf_vit/train/keys.py`, in the dataclasses that it names, and in `configs/`.
"""


def page() -> str:
    """Returns the text of the page."""
    parts = [_TOP]
    for task, title in _TASKS.items():
        tree = command.keys_of(task)
        defaults = settings.config_of(tree)
        if task == "train":
            defaults = default_config("vit", "S/16")
        parts.append(f"\n## {title}\n\n| key | default | values | meaning |")
        parts.append("|---|---|---|---|")
        for key, value, expected, meaning in settings.rows(tree, defaults):
            cells = (f"`{key}`", f"`{value!r}`", expected, meaning)
            parts.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
