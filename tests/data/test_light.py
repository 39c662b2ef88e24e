"""What may be imported without TensorFlow."""

import subprocess
import sys


def test_the_device_side_imports_no_tensorflow():
    code = "import sys, wf_vit.data.augment, wf_vit.data.config; "
    code += "sys.exit('tensorflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
