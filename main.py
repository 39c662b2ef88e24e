"""Runs an experiment: ``python main.py --config=configs/NAME.py``.

It is the command ``wf-vit`` of the installed package; ``--help`` says the rest.
"""

from wf_vit.command import program

if __name__ == "__main__":
    program()
