"""Runs an experiment: ``python main.py --config=configs/NAME.py``.

It is the command ``wf-vit`` of the installed package; ``--help`` says the rest.
"""

import sys

from wf_vit.command import main

if __name__ == "__main__":
    sys.exit(main())
