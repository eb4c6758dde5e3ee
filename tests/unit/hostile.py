"""Programs that want out of a sandbox, want its machine, or want what they did not earn.

Each prints ESCAPED where it got what it must not get, so that it can be seen to try: where
`is_harmless`, it does escape when it is run by a plain interpreter. What is at stake is in
`PREAMBLE`, filled in by the test.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PREAMBLE = """
import ctypes, errno, mmap, os, resource, signal, socket, subprocess, sys, threading, time
TOKEN, PARENT, SECRET_FILE, HOME, REPOSITORY = {token!r}, {parent}, {file!r}, {home!r}, {repo!r}
PORT, UNIX_SOCKET, ABSTRACT = {port}, {unix!r}, {abstract!r}
def escaped(*how):
    print("ESCAPED", *how, flush=True)
def attempt(function, *arguments):
    try:
        result = function(*arguments)
    except (OSError, ValueError, RuntimeError, OverflowError, AttributeError, ImportError) as error:
        return None
    escaped(getattr(function, "__name__", ""), *arguments)
    return result
def call(number, *arguments):
    result = ctypes.CDLL(None, use_errno=True).syscall(number, *arguments)
    if result >= 0:
        escaped("system call", number)
    return result
"""
"""Beginning of every program. System calls have the numbers of x86_64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hostile:
    """A program; how it must end, where that is not its own choice; and if it can do no harm."""

    program: str
    end: Literal["time", "output"] | None = None
    is_harmless: bool = False


# fmt: off
PROGRAMS: dict[str, Hostile] = {
    # --- processes ---
    "fork bomb": Hostile(program="""
while True:
    if attempt(os.fork) is None: break
"""),
    "fork by system calls": Hostile(program="""
for number, arguments in ((57, ()), (58, ()), (56, (17, 0, 0, 0, 0)), (435, (bytes(88), 88))):
    if call(number, *arguments) == 0: os._exit(0)
"""),
    "shell": Hostile(is_harmless=True, program="""
if os.system("exit 3") == 3 << 8: escaped("shell")
attempt(subprocess.check_output, [sys.executable, "-c", "pass"])
attempt(os.posix_spawn, sys.executable, [sys.executable, "-c", "pass"], {})
"""),
    "another program in its place": Hostile(is_harmless=True, program="""
for file in (sys.executable, "/proc/self/exe", "/usr/lib64/ld-linux-x86-64.so.2"):
    try: os.execve(file, [file, "-c", "print('ESC' + 'APED')"], {})
    except OSError: pass
"""),
    "daemon": Hostile(program="""
for make in (os.fork, os.setsid, os.fork): attempt(make)
"""),
    "zombies": Hostile(is_harmless=True, program="""
for _ in range(3):
    pid = attempt(os.fork)
    if pid == 0: os._exit(0)
"""),
    "worker processes": Hostile(program="""
import multiprocessing
def work(): escaped("a worker process")
attempt(lambda: multiprocessing.get_context("fork").Process(target=work).start())
"""),
    "thread bomb": Hostile(is_harmless=True, program="""
threading.stack_size(32768)
try:
    for number in range(300): threading.Thread(target=time.sleep, args=(0.2,)).start()
    escaped(number, "threads")
except RuntimeError: pass
os._exit(0)
"""),
    # --- memory, files, output ---
    "memory bomb": Hostile(program="""
kept = []
while True:
    kept.append(bytearray(2**24))
    if len(kept) > 32: escaped("512 MB")
"""),
    "memory shared": Hostile(is_harmless=True, program="""
attempt(lambda: mmap.mmap(-1, 2**29))
"""),
    "memory as a file": Hostile(is_harmless=True, program="""
attempt(os.memfd_create, "more")
"""),
    "memory of the system": Hostile(program="""
call(29, 0, 2**20, 0o1600)
from multiprocessing import shared_memory
memory = attempt(lambda: shared_memory.SharedMemory(create=True, size=2**20))
if memory: memory.unlink()
"""),
    "memory in pipes": Hostile(is_harmless=True, program="""
import fcntl
num_bytes = 0
try:
    for _ in range(200):
        reading, writing = os.pipe()
        num_bytes += fcntl.fcntl(writing, 1032)
        try: fcntl.fcntl(writing, 1031, 2**20)
        except OSError: pass
        else: escaped("a larger pipe")
except OSError: pass
"""),
    "descriptor exhaustion": Hostile(is_harmless=True, program="""
try:
    for number in range(200): os.dup(0)
    escaped(number, "descriptors")
except OSError: pass
"""),
    "disk filler": Hostile(program="""
for folder in (".", "/", "/tmp", "/var/tmp", "/dev/shm", "/run", HOME, REPOSITORY,
               os.path.dirname(SECRET_FILE), os.path.dirname(os.__file__)):
    file = attempt(open, os.path.join(folder, TOKEN), "wb")
    if file: file.write(bytes(2**20))
    attempt(lambda: os.open(folder, os.O_TMPFILE | os.O_RDWR))
"""),
    "shared memory folder": Hostile(program="""
attempt(open, "/dev/shm/" + TOKEN, "wb")
attempt(os.mkdir, "/dev/shm/" + TOKEN + "d")
"""),
    "sparse file": Hostile(program="""
attempt(os.truncate, SECRET_FILE, 2**40)
descriptor = attempt(os.open, "/tmp/" + TOKEN, os.O_RDWR | os.O_CREAT)
if descriptor: os.ftruncate(descriptor, 2**40)
"""),
    "names without files": Hostile(program="""
for folder in (".", "/tmp", "/dev/shm", os.path.dirname(SECRET_FILE)):
    path = os.path.join(folder, TOKEN)
    attempt(os.mkdir, path + "d")
    attempt(os.mkfifo, path + "f")
    attempt(os.symlink, "/etc", path + "l")
    attempt(os.link, SECRET_FILE, path + "h")
    attempt(os.mknod, path + "n")
    attempt(os.rename, SECRET_FILE, path + "r")
"""),
    "endless output": Hostile(end="output", program="""
while True: os.write(1, b"x" * 65536)
"""),
    "endless errors": Hostile(end="output", program="""
while True: os.write(2, b"x" * 65536)
"""),
    "one endless line": Hostile(program="""
print("x" * 10**8)
"""),
    # --- files of others ---
    "secret file": Hostile(is_harmless=True, program="""
attempt(lambda: open(SECRET_FILE).read())
attempt(os.open, SECRET_FILE, os.O_RDONLY)
"""),
    "ways around the root": Hostile(is_harmless=True, program="""
for way in ("../" * 20 + SECRET_FILE, "/proc/self/root" + SECRET_FILE, "/proc/1/root" + SECRET_FILE,
            "/proc/self/cwd" + SECRET_FILE, "/proc/%d/root%s" % (PARENT, SECRET_FILE)):
    attempt(lambda: open(way).read())
attempt(lambda: os.open(SECRET_FILE, os.O_PATH) and os.open("/proc/self/fd/5", 0))
"""),
    "symlink escape": Hostile(program="""
attempt(os.symlink, SECRET_FILE, TOKEN)
attempt(lambda: open(TOKEN).read())
"""),
    "folders of others": Hostile(is_harmless=True, program="""
known = {REPOSITORY: "README.md", "/etc": "passwd", os.path.dirname(SECRET_FILE): "secret",
         "/proc/%d" % PARENT: "environ", "/sys": "kernel", "/usr": "sbin"}
for folder, name in known.items():
    try:
        if name in os.listdir(folder): escaped(folder)
    except OSError: pass
for file in ("/etc/passwd", "/etc/hosts", REPOSITORY + "/README.md"): attempt(open, file)
"""),
    "installed packages": Hostile(is_harmless=True, program="""
sys.path += [os.path.dirname(os.__file__) + "/site-packages", {packages!r}]
attempt(lambda: __import__("numpy"))
"""),
    "environment": Hostile(is_harmless=True, program="""
if TOKEN in str(os.environ): escaped("environment")
for number in ("self", "1", PARENT, os.getppid()):
    for name in ("environ", "cmdline", "maps", "mem", "auxv"):
        try: content = open(f"/proc/{number}/{name}", "rb").read()
        except OSError: continue
        if TOKEN.encode() in content or number == PARENT: escaped(number, name)
"""),
    "descriptors of others": Hostile(is_harmless=True, program="""
for number in range(3, 1024): attempt(os.fstat, number)
try: names = os.listdir(f"/proc/{PARENT}/fd")
except OSError: names = []
for name in names: escaped(name)
"""),
    "memory of others": Hostile(is_harmless=True, program="""
room = ctypes.create_string_buffer(8)
vector = (ctypes.c_void_p * 2)(ctypes.addressof(room), 8)
result = ctypes.CDLL(None).syscall(310, PARENT, vector, 1, vector, 1, 0)
if result >= 0 or ctypes.CDLL(None).syscall(438, 0, 0, 0) >= 0: escaped("memory")
call(434, PARENT, 0)
"""),
    "itself deleted": Hostile(program="""
main = sys._getframe().f_back.f_code.co_filename
for path in (main, sys.argv[0], sys.executable): attempt(os.remove, path)
attempt(os.chmod, main, 0)
"""),
    "standard library changed": Hostile(program="""
for path in (os.__file__, sys.executable, "/etc/ld.so.cache"):
    attempt(open, path, "ab")
    attempt(os.chmod, path, 0o777)
    attempt(os.utime, path)
    attempt(os.setxattr, path, "user.x", b"")
"""),
    "devices": Hostile(program="""
for name in ("kmsg", "mem", "sda", "vda", "fuse", "kvm", "tty", "ptmx", "net/tun", "null", "full"):
    attempt(open, "/dev/" + name, "rb")
    attempt(open, "/dev/" + name, "wb")
attempt(os.mknod, "/tmp/" + TOKEN, 0o60666, os.makedev(8, 0))
"""),
    # --- network ---
    "tcp": Hostile(is_harmless=True, program="""
attempt(lambda: socket.create_connection(("127.0.0.1", PORT), timeout=0.5))
"""),
    "udp": Hostile(is_harmless=True, program="""
attempt(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", PORT)))
"""),
    "unix socket": Hostile(is_harmless=True, program="""
attempt(lambda: socket.socket(socket.AF_UNIX).connect(UNIX_SOCKET))
"""),
    "abstract unix socket": Hostile(is_harmless=True, program="""
attempt(lambda: socket.socket(socket.AF_UNIX).connect(ABSTRACT))
"""),
    "dns": Hostile(is_harmless=True, program="""
attempt(socket.getaddrinfo, "localhost", 80)
"""),
    "other sockets": Hostile(is_harmless=True, program="""
attempt(socket.socketpair)
for family in (socket.AF_NETLINK, socket.AF_PACKET, 40, 38):
    attempt(socket.socket, family, socket.SOCK_RAW)
"""),
    # --- signals and the kernel ---
    "signals to the parent": Hostile(is_harmless=True, program="""
for pid in (PARENT, -1, 0, 1, os.getppid()):
    attempt(os.kill, pid, 0)
    if call(200, pid, 0) < 0: call(234, pid, pid, 0)
call(129, PARENT, 0, bytes(128))
"""),
    "signals by a descriptor": Hostile(program="""
import fcntl
reading, writing = os.pipe()
attempt(fcntl.fcntl, reading, fcntl.F_SETOWN, PARENT)
attempt(fcntl.fcntl, reading, 10, 9)
attempt(fcntl.ioctl, reading, 0x8901, PARENT.to_bytes(4, "little"))
"""),
    "kill everybody": Hostile(program="""
attempt(os.kill, -1, signal.SIGCONT)
attempt(os.killpg, 0, signal.SIGCONT)
attempt(signal.pidfd_send_signal, 3, signal.SIGCONT)
"""),
    "limits of others": Hostile(is_harmless=True, program="""
attempt(resource.prlimit, PARENT, resource.RLIMIT_NOFILE)
attempt(os.setpriority, os.PRIO_PROCESS, PARENT, 0)
"""),
    "its own limits": Hostile(is_harmless=True, program="""
for name in ("AS", "CPU", "NPROC", "NOFILE", "FSIZE", "CORE"):
    kind = getattr(resource, "RLIMIT_" + name)
    if resource.getrlimit(kind)[1] == resource.RLIM_INFINITY: escaped(name, "without limit")
    attempt(resource.setrlimit, kind, (2**50, 2**50))
"""),
    "ptrace": Hostile(program="""
call(101, 16, PARENT, 0, 0)
call(101, 0, 0, 0, 0)
"""),
    "mount and chroot": Hostile(program="""
attempt(os.chroot, "/")
for number, arguments in ((165, (b"x", b"/usr", b"tmpfs", 0, 0)), (166, (b"/usr", 2)),
                          (155, (b".", b".")), (428, (-100, b"/", 1)), (304, (0, 0, 0))):
    call(number, *arguments)
"""),
    "namespaces of its own": Hostile(program="""
for flags in (0x10000000, 0x20000, 0x10020000, 0x40000000): call(272, flags)
call(308, 0, 0)
"""),
    "another user": Hostile(program="""
if os.getuid() == 0: escaped("root")
for number in (0, 1, 1000):
    attempt(os.setresuid, number, number, number)
    attempt(os.setresgid, number, number, number)
attempt(os.setgroups, [0])
"""),
    "rare system calls": Hostile(program="""
for number in (425, 321, 298, 323, 248, 250, 240, 68, 253, 294, 300, 246, 175, 313, 169, 303, 447):
    call(number, 0, 0, 0, 0, 0)
call(157, 4, 1, 0, 0, 0)
"""),
    "calls of 32 bits": Hostile(program="""
room = mmap.mmap(-1, 4096, prot=7)
room.write(b"\\x53\\xb8\\x14\\x00\\x00\\x00\\xcd\\x80\\x5b\\xc3")  # push rbx; mov eax, 20; int 0x80
address = ctypes.addressof(ctypes.c_char.from_buffer(room))
if ctypes.CFUNCTYPE(ctypes.c_int)(address)() > 0: escaped("getpid of 32 bits")
"""),
    "calls of x32": Hostile(program="""
call(0x40000000 + 57)
call(0x40000000 + 41, 2, 1, 0)
"""),
    # --- not to end ---
    "busy loop": Hostile(end="time", program="""
while True: pass
"""),
    "sleep": Hostile(end="time", program="""
while True: time.sleep(1000)
"""),
    "signals ignored": Hostile(end="time", program="""
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: signal.pause()
"""),
    "exceptions caught": Hostile(end="time", program="""
while True:
    try:
        while True: pass
    except BaseException: pass
"""),
    "descriptors closed": Hostile(end="time", program="""
os.closerange(0, 1024)
while True: pass
"""),
    "threads that stay": Hostile(end="time", program="""
def forever():
    while True: pass
for _ in range(2): threading.Thread(target=forever).start()
"""),
    "work at exit": Hostile(end="time", program="""
import atexit
@atexit.register
def stay():
    while True: pass
"""),
    "input never comes": Hostile(program="""
if sys.stdin.read(): escaped("input")
print(sys.stdin.read(), end="")
"""),
    # --- what breaks the interpreter ---
    "deep recursion": Hostile(program="""
def deeper(): return deeper()
try: deeper()
except RecursionError: pass
nested = []
for _ in range(10**6): nested = [nested]
sys.setrecursionlimit(10**9)
repr(nested)
"""),
    "segmentation fault": Hostile(program="""
ctypes.string_at(0)
"""),
    "core dump": Hostile(program="""
attempt(resource.setrlimit, resource.RLIMIT_CORE, (2**20, 2**20))
os.abort()
"""),
    "input changed": Hostile(program="""
attempt(os.write, 0, b"x")
attempt(os.ftruncate, 0, 2**20)
attempt(open, "/dev/stdin", "r+b")
attempt(open, "/proc/self/fd/0", "r+b")
attempt(os.fchmod, 0, 0)
"""),
    "standard output replaced": Hostile(program="""
class Forged:
    def write(self, text): raise SystemExit(0)
    def flush(self): raise SystemExit(0)
sys.stdout = sys.__stdout__ = sys.stderr = Forged()
print("x")
"""),
}
# fmt: on
