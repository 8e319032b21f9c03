"""What the shell scripts of benchmarks/ would run, without running it."""

import os
import re
import subprocess
from pathlib import Path

from tests.golden import ROOT


def commands(name: str | Path, *arguments: str | int, **settings: str) -> list[str]:
    """The lines that a script prints when its Python is ``echo``: the commands it would run."""
    script = ["bash", str(ROOT / "benchmarks" / name), *map(str, arguments)]
    done = subprocess.run(script, env=os.environ | {"PYTHON": "echo"} | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def files(command: str) -> list[str]:
    """The configurations of a command, in their order."""
    return re.findall(r"-c (\S+)", command)
