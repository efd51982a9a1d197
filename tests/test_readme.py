"""What the README shows runs as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.launchers

ROOT = Path(__file__).resolve().parents[1]


def test_the_python_example_trains_and_prints_its_loss_and_model_folder(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    script = tmp_path / "own_data.py"
    script.write_text(blocks[0], encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    loss, folder = done.stdout.splitlines()[-1].split()
    assert float(loss) < 1.0
    assert (tmp_path / folder / "model.safetensors").is_file()
