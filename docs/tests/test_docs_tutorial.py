"""The tutorial, typed in and run: files are written as they come, commands end as they say."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAME = re.compile(r"`([\w.]+\.(?:py|toml))`[^`]*\Z")
FEWEST_COMMANDS = 6
MODULES = {
    "kda": [sys.executable, "-m", "kda_conformance"],
    "pytest": [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"],
}


def test_the_tutorial_does_what_it_says(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "tutorial.md").read_text()
    commands, end = 0, 0
    for block in BLOCK.finditer(text):
        before, end = text[end : block.start()], block.end()
        if block[1] == "sh":
            command, _, status = block[2].strip().partition("# exit status ")
            program, *arguments = shlex.split(command)
            done = subprocess.run(
                [*MODULES[program], *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
            )
            assert done.returncode == int(status), f"{command}\n{done.stdout}{done.stderr}"
            commands += 1
        else:
            name = NAME.search(before)
            assert name is not None, f"no file name before\n{block[2]}"
            (tmp_path / name[1]).write_text(block[2])
    assert commands >= FEWEST_COMMANDS
