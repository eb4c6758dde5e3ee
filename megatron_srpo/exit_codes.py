"""With what does a process end, and so, is another start worth it?   (docs/operations.md)"""

from __future__ import annotations

BROKEN = 1
"""Python's own for an exception that nobody expected; another start may go on."""
REFUSED = 2
"""What the user gave is wrong."""
ALARM = 3
"""The run stopped itself; started again it would do the same."""
STOPPED = 75
"""It was asked to stop, and saved: sysexits.h's "try again later"."""
