"""How tests start `megatron-srpo`: as if no launcher had started the tests."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from megatron_srpo.environment import LAUNCHED, unlaunched


def forked() -> Any:
    """How processes start: from a server that has imported everything, in a second."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.survival.preloaded"])
    return context


def start(*arguments: str | Path, processes: int = 1) -> subprocess.Popen[str] | Command:
    """`megatron-srpo ARGUMENTS`, alone in a forked process or under torchrun in new ones."""
    words = [str(argument) for argument in arguments]
    if processes == 1:
        return Command(words)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.Popen(
        [sys.executable, *torchrun, "-m", "megatron_srpo", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=unlaunched(),
    )


class Command:
    """A command in a forked process; as much of `subprocess.Popen` as is needed."""

    def __init__(self, words: list[str]) -> None:
        self._output = Path(tempfile.mkstemp(prefix="command-")[1])
        self._process = forked().Process(target=_be_command, args=(words, self._output))
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def communicate(self, timeout: float) -> tuple[str, None]:
        """Both streams, as one, when it has ended."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            raise TimeoutError(self._output.read_text("utf-8"))
        said = self._output.read_text("utf-8")
        self._output.unlink()
        return said, None


def _be_command(words: list[str], output: Path) -> None:
    for name in LAUNCHED:
        os.environ.pop(name, None)
    with output.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    from megatron_srpo.__main__ import main

    sys.exit(main(words))
