"""A real Slurm on this machine, for tests: munge, the controller and virtual nodes, loopback only.

All that it writes (configuration, key, sockets, spool, logs) is in one folder; ports are free ones.
Where the user may make namespaces, each node has its own: its jobs see its hostname, and killing it
kills every process on it at once, as when a machine dies.

Needs Debian's slurmctld, slurmd, slurm-client and munge (22.05 in Debian 12); no service of theirs.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import random
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import dedent

SLURM = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
PROGRAMS = (*SLURM, "unshare", "setpriv", "setsid")
SEARCH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
# A process group of its own for each daemon; none outlives the test session, however that ends.
TIED = ("setpriv", "--pdeathsig", "KILL")
NAMESPACES = ("unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
# Before a job's program. The usual proctrack/cgroup, which tests cannot have, sends signals to what
# Slurm itself has started and to nothing below, but KILL to everything. With proctrack/pgid a
# session of its own keeps the program from signals; KILL it gets when its parent dies.
AS_IN_A_CGROUP = "setsid setpriv --pdeathsig KILL"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL")


def missing_programs() -> list[str]:
    return [name for name in PROGRAMS if shutil.which(name, path=SEARCH) is None]


class Cluster:
    """Nodes n1, n2, ... in the partitions `main` and, with the right to preempt it, `urgent`."""

    def __init__(self, folder: Path, *, num_nodes: int) -> None:
        self.folder = folder
        self.nodes = [f"n{number}" for number in range(1, num_nodes + 1)]
        trial = subprocess.run([*NAMESPACES, "true"], capture_output=True)
        self.has_namespaces = trial.returncode == 0
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        outside = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))}
        self.environment = outside | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": SEARCH}
        for name in ("log", "state", "munge", "socket", *(f"spool/{node}" for node in self.nodes)):
            (folder / name).mkdir(parents=True)
        (folder / "munge").chmod(0o700)
        _configure(folder, self.nodes)

    # --- daemons ---------------------------------------------------------------------------------

    def start(self) -> None:
        munge, socket_path = self.folder / "munge", self.folder / "socket" / "munge"
        key = munge / "key"
        key.touch(0o600)
        key.write_bytes(os.urandom(1024))
        self._start(
            *("munged", "munged", "--foreground", "--force", f"--key-file={key}"),
            *(f"--socket={socket_path}", f"--pid-file={munge / 'pid'}"),
            *(f"--seed-file={munge / 'seed'}", f"--log-file={munge / 'log'}"),
        )
        wait_for("munged", socket_path.is_socket)
        self._start("slurmctld", "slurmctld", "-D", "-i")
        wait_for("slurmctld", lambda: "is UP" in self.ask("scontrol", "ping"))
        for node in self.nodes:
            self._start_node(node)
        usable = ("idle", "mixed", "allocated")
        wait_for("nodes", lambda: set(self._states()) <= set(usable), seconds=30)

    def _start_node(self, node: str) -> None:
        slurmd = ("slurmd", "-D", "-N", node)
        if self.has_namespaces:
            named = (
                f'mount --bind "{self.folder}/hosts" /etc/hosts; hostname {node}; "$@" & wait $!'
            )
            self._start(node, *NAMESPACES, "bash", "-c", named, "_", *slurmd)
        else:
            self._start(node, *slurmd)

    def kill_node(self, node: str) -> None:
        """With everything that runs on it; needs namespaces."""
        assert self.has_namespaces
        self.daemons.pop(node).kill()

    def _states(self) -> list[str]:
        return self.ask("sinfo", "-h", "-N", "-p", "main", "-o", "%T").split()

    def _start(self, name: str, *command: str) -> None:
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                [*TIED, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment,
                start_new_session=True,
            )

    def stop(self) -> None:
        self.ask("scancel", "--full", "--signal=KILL", "--user", _user())
        self.ask("scancel", "--user", _user())
        wait_for("the end of all jobs", lambda: not self.ask("squeue", "-h"), seconds=30)
        # Namespaces go with KILL; what is in them goes with them.
        for name in [*self.nodes, "slurmctld", "munged"]:
            if daemon := self.daemons.pop(name, None):
                daemon.kill()
                daemon.wait()

    # --- jobs ------------------------------------------------------------------------------------

    def ask(self, *command: str) -> str:
        """Standard output of one of Slurm's commands, whether it succeeds or not."""
        return subprocess.run(command, env=self.environment, capture_output=True, text=True).stdout

    def submit(self, *arguments: str | Path, folder: Path, **environment: str) -> str:
        """`sbatch ARGUMENTS` in a folder; returns the job's number."""
        done = subprocess.run(
            ["sbatch", "--parsable", *map(str, arguments)],
            cwd=folder,
            env=self.environment | environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.ask("scontrol", "show", "job", "-o", number)))

    def finish(self, number: str, *, seconds: float = 60) -> dict[str, str]:
        """Waits until the job has ended for good."""
        wait_for(
            f"job {number}", lambda: self.job(number).get("JobState") in ENDED, seconds=seconds
        )
        return self.job(number)


def wait_for(what: str, is_so: Callable[[], bool], *, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.1)


def _user() -> str:
    return pwd.getpwuid(os.geteuid()).pw_name


def _free_ports(count: int) -> range:
    """Below those that the kernel gives to connections: one of them could take a free one before a
    daemon does."""
    while True:
        first = random.randrange(10000, 20000 - count)
        ports = range(first, first + count)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in ports:
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return ports


def _configure(folder: Path, names: Sequence[str]) -> None:
    controller, *ports = _free_ports(1 + len(names))
    hosts = ["localhost", *names]
    (folder / "hosts").write_text("".join(f"127.0.0.1 {host}\n" for host in hosts))
    nodes = [
        f"NodeName={name} NodeHostname={name} NodeAddr=127.0.0.1 Port={port} CPUs=4 "
        "RealMemory=8000 Gres=gpu:2"
        for name, port in zip(names, ports, strict=True)
    ]
    # Jobs' numbers choose their ports: sessions side by side must not share them.
    settings = f"""\
        ClusterName=tests
        SlurmctldHost=localhost(127.0.0.1)
        SlurmctldPort={controller}
        FirstJobId={random.randrange(1000, 60000000)}
        SlurmUser={_user()}
        SlurmdUser={_user()}
        AuthType=auth/munge
        CredType=cred/munge
        AuthInfo=socket={folder}/socket/munge,cred_expire=5
        CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
        StateSaveLocation={folder}/state
        SlurmdSpoolDir={folder}/spool/%n
        SlurmctldPidFile={folder}/slurmctld.pid
        SlurmdPidFile={folder}/%n.pid
        SlurmctldLogFile={folder}/log/slurmctld.log
        SlurmdLogFile={folder}/log/%n.log
        ProctrackType=proctrack/pgid
        TaskPlugin=task/none
        JobAcctGatherType=jobacct_gather/none
        MpiDefault=none
        PropagateResourceLimits=NONE
        ReturnToService=2
        SelectType=select/cons_tres
        SelectTypeParameters=CR_Core_Memory
        DefMemPerCPU=100
        SlurmdParameters=config_overrides
        GresTypes=gpu
        AccountingStorageType=accounting_storage/none
        JobCompType=jobcomp/none
        SchedulerType=sched/backfill
        SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
        JobRequeue=1
        EnforcePartLimits=ALL
        KillWait=5
        SlurmdTimeout=10
        SlurmctldTimeout=10
        MessageTimeout=10
        TCPTimeout=2
        PreemptType=preempt/partition_prio
        PreemptMode=REQUEUE
        PartitionName=main Nodes=ALL Default=YES State=UP PriorityTier=1 GraceTime=20
        PartitionName=urgent Nodes=ALL State=UP PriorityTier=10 PreemptMode=OFF
        """
    # Slurm asks only whether they are devices.
    devices = "".join(f"Name=gpu File={device}\n" for device in ("/dev/null", "/dev/zero"))
    (folder / "gres.conf").write_text(f"AutoDetect=off\n{devices}")
    (folder / "slurm.conf").write_text(dedent(settings) + "\n".join(nodes) + "\n")
    # 22.05 does not know `disabled`, later versions need it where there is no systemd.
    said = subprocess.run(["slurmd", "-V"], env={"PATH": SEARCH}, capture_output=True, text=True)
    version = re.search(r" (\d+)\.", said.stdout)
    if version and int(version[1]) >= 23:
        (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
