"""How does a finished run get its report?   In a process of its own, so that nothing that goes
wrong there, were it a crash, is the end of a run that was done."""

from __future__ import annotations

import contextlib
import subprocess
import sys

from megatron_srpo.run_folder import RunFolder

MOST_S = 900.0


def leave_report(folder: RunFolder) -> None:
    """Writes `report.html`, or a line in log.txt that says why it is not there."""
    command = [sys.executable, "-m", "megatron_srpo", "report", str(folder.root)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=MOST_S)
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        why = f"{folder.report} was not written: {said.strip().splitlines()[-1]}"
        print(why, file=sys.stderr)
        with contextlib.suppress(OSError), folder.log.open("a", encoding="utf-8") as log:
            log.write(why + "\n")
