"""What bubblewrap does, where it is not installed: a process alone in namespaces of its own.

    python namespaces.py SUPERVISOR INFO_FD SPECIFICATION PROGRAM ARGUMENT...

The program is process 1 of its process namespace and sees a read-only root folder that holds the
given paths; its end is this process's. Like bwrap it needs no right but that to make user
namespaces, or to mount. Run by path, it imports as little as `inside.py`.
"""

from __future__ import annotations

import ctypes
import marshal
import os
import stat
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
OPEN_TREE, MOVE_MOUNT, MOUNT_SETATTR = 428, 429, 442
"""The same numbers on all architectures."""
OPEN_TREE_CLONE, MOVE_MOUNT_F_EMPTY_PATH = 1, 4
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
READ_ONLY, NO_SETUID, NO_DEVICES = 1, 2, 4
"""MOUNT_ATTR_... of linux/mount.h, and MS_... of the same values."""
MS_REC_PRIVATE = 0x4000 | 0x40000
DETACHED = 2
PR_SET_PDEATHSIG, SIGKILL = 1, 9
NOBODY = 65534

LIBC = ctypes.CDLL(None, use_errno=True)


def main(supervisor: int, info_fd: int, specification: dict[str, Any], command: list[str]) -> None:
    """`specification`, by `marshal` and in hexadecimal: `is_admin`, whether mounting needs no user
    namespace; `readable`, paths that are seen where they are; `hidden`, folders of those that are
    seen empty; `links`, symbolic links (path, target); `files`, (path, descriptor) of what is
    copied."""
    _call("prctl", PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    if os.getppid() != supervisor:  # it ended before it could be watched
        sys.exit(1)
    _unshare(with_user=not specification["is_admin"])
    child = os.fork()
    if child == 0:
        _call("prctl", PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
        _enter_root(specification)
        os.close(info_fd)
        os.execv(command[0], command)
    os.write(info_fd, b'{"child-pid": %d}' % child)
    os.close(info_fd)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(status if status >= 0 else 128 - status)


def _call(name: str, *arguments: Any) -> int:
    """Raises `OSError` where a function of the C library returns -1."""
    result = LIBC[name](*arguments)
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}{arguments}: {os.strerror(number)}")
    return result


def _unshare(*, with_user: bool) -> None:
    user, group = os.geteuid(), os.getegid()
    spaces = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    _call("unshare", spaces | (CLONE_NEWUSER if with_user else 0))
    if with_user:
        _write("/proc/self/setgroups", b"deny")
        _write("/proc/self/uid_map", b"%d %d 1" % (NOBODY, user))
        _write("/proc/self/gid_map", b"%d %d 1" % (NOBODY, group))


def _write(path: str, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)


def _enter_root(specification: dict[str, Any]) -> None:
    """A new root folder is built over /tmp, entered, and the old one let go."""
    os.umask(0o022)
    _call("mount", None, b"/", None, MS_REC_PRIVATE, None)
    trees = [(path, _tree(path)) for path in specification["readable"]]
    size = sum(os.fstat(descriptor).st_size for _, descriptor in specification["files"])
    _tmpfs("/tmp", num_bytes=size + 2**20)
    for path, tree in trees:
        _mount_tree(tree, "/tmp" + path)
    for path in specification["hidden"]:
        _tmpfs("/tmp" + path, num_bytes=4096)
    for path, target in specification["links"]:
        os.symlink(target, "/tmp" + path)
    for path, descriptor in specification["files"]:
        os.makedirs(os.path.dirname("/tmp" + path), exist_ok=True)
        with open(descriptor, "rb") as file:
            _write("/tmp" + path, file.read())
    os.chdir("/tmp")
    _call("pivot_root", b".", b".")
    _call("umount2", b".", DETACHED)
    os.chdir("/")
    attributes = (ctypes.c_uint64 * 4)(READ_ONLY | NO_SETUID | NO_DEVICES, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    _call("syscall", MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, attributes, size)


def _tree(path: str) -> int:
    """A copy of what is mounted at and under a path, not mounted anywhere."""
    flags = OPEN_TREE_CLONE | os.O_CLOEXEC | AT_RECURSIVE
    return _call("syscall", OPEN_TREE, AT_FDCWD, path.encode(), flags)


def _mount_tree(tree: int, place: str) -> None:
    os.makedirs(os.path.dirname(place), exist_ok=True)
    if stat.S_ISDIR(os.fstat(tree).st_mode):
        os.mkdir(place)
    else:
        _write(place, b"")
    _call("syscall", MOVE_MOUNT, tree, b"", AT_FDCWD, place.encode(), MOVE_MOUNT_F_EMPTY_PATH)
    os.close(tree)


def _tmpfs(path: str, *, num_bytes: int) -> None:
    options = b"size=%d,nr_inodes=1000,mode=755" % num_bytes
    _call("mount", b"tmpfs", path.encode(), b"tmpfs", NO_SETUID | NO_DEVICES, options)


if __name__ == "__main__":
    what = marshal.loads(bytes.fromhex(sys.argv[3]))
    main(int(sys.argv[1]), int(sys.argv[2]), what, sys.argv[4:])
