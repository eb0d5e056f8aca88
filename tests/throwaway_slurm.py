"""A Slurm of one node, for the tests alone: munged, slurmctld and slurmd without systemd, in a folder, on free ports.

Two CPUs, two pretend GPUs, and two partitions: jobs in ``high`` take the node away from those in ``main``, which are
told before and put back into the queue. No accounting, as on many small clusters: no ``sacct``. Timeouts are long: the
machine may be busy, and no test waits for one. Several clusters may live at once: no two have a job of the same number.
"""

from __future__ import annotations

import contextlib
import getpass
import math
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from laboratory import until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "ps", "pgrep")

PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])  # where the daemons are, for anybody

CONFIG = """
ClusterName=throwaway
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=1800
CredType=cred/munge
SlurmctldPort={controller_port}
SlurmdPort={node_port}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{parameters}
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
KillWait=30
MinJobAge=3600
FirstJobId={controller_port}000
MessageTimeout=30
BatchStartTimeout=180
UnkillableStepTimeout=180
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=2000 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=120
PartitionName=high Nodes={host} Default=NO MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


class Cluster(NamedTuple):
    folder: Path
    host: str

    @property
    def environment(self) -> dict[str, str]:
        """What a command needs to talk to this cluster; nothing of a cluster around the tests."""
        outer = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SUBMITIT_"))}
        return outer | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": PATH}

    def __call__(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}{self.logs()}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job: JobState, Reason, Restarts, ..."""
        words = self("scontrol", "show", "job", "-o", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def start_until(self, number: str, condition: Callable[[], object]) -> None:
        """Start a job that was put back, which by itself waits half an hour (``cred_expire``), until ``condition``."""
        # Until the node's last word about the job, it is COMPLETING; a start in that second would carry a credential
        # that the node has revoked, since it compares whole seconds.
        until(lambda: self.job(number)["JobState"] == "PENDING" and not self._steps(number), self.logs)
        time.sleep(2)
        self("scontrol", "update", f"JobId={number}", "StartTime=now")
        until(condition, self.logs)

    def bring_limit_near(self, number: str) -> None:
        """Let a running job reach its time limit ten minutes from now; one that wants a quarter of an hour is told.

        Slurm looks twice a minute whose limit is so near, and counts limits in whole minutes. The job has the rest of
        the ten to end by itself, whatever else the machine does.
        """
        hours, minutes, seconds = map(int, self.job(number)["RunTime"].split(":"))
        limit = math.ceil((hours * 3600 + minutes * 60 + seconds + 600) / 60)
        self("scontrol", "update", f"JobId={number}", f"TimeLimit={limit}")

    def submit(self, partition: str, *command: str) -> str:
        """A job beside those under test; its number."""
        options = (f"--partition={partition}", "--cpus-per-task=2", f"--output={os.devnull}")
        return self("sbatch", "--parsable", *options, f"--wrap={' '.join(command)}").strip()

    def clear(self) -> None:
        """End every job and wait until the node takes the next."""
        self("scancel", "--user", getpass.getuser())
        until(lambda: not self("squeue", "--noheader"), self.logs)
        until(lambda: "idle" in self("sinfo", "--noheader", "--format=%t"), self.logs)

    def lose_node(self, number: str) -> None:
        """The node loses its power while a job is running there: its daemon and the job's processes die at once.

        The controller would notice after its ``SlurmdTimeout``; here somebody tells it.
        """
        parents = dict(map(int, line.split()) for line in self("ps", "-eo", "pid=,ppid=").splitlines())
        dying = self._steps(number)
        for pid in dying:  # grows
            dying += [child for child, parent in parents.items() if parent == pid]
        assert len(dying) > 1, "a step without a process"
        for pid in [int((self.folder / "slurmd.pid").read_text()), *dying]:
            with contextlib.suppress(ProcessLookupError):  # of those that saw the others die
                os.kill(pid, signal.SIGKILL)
        self("scontrol", "update", f"NodeName={self.host}", "State=down", "Reason=power")

    def start_node(self) -> None:
        """The node's daemon, for the first time or after `lose_node`, until it takes jobs."""
        self("slurmd")
        # The first moments the controller does not answer.
        until(lambda: "idle" in _said(self, "sinfo", "--noheader", "--format=%T"), self.logs)

    def _steps(self, number: str) -> list[int]:
        """The processes by which the node runs a job's steps; none once it is rid of the job."""
        return [int(pid) for pid in _said(self, "pgrep", "-f", rf"^slurmstepd: \[{number}\.").split()]

    def logs(self) -> str:
        tails = [f"{log.name}:\n" + log.read_text()[-1500:] for log in self.folder.glob("slurm*.log")]
        return "\n".join(["", *tails])


def _said(cluster: Cluster, *command: str) -> str:
    return subprocess.run(command, env=cluster.environment, capture_output=True, text=True).stdout


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextlib.contextmanager
def started(folder: Path, *, user_signal: bool = True) -> Iterator[Cluster]:
    """The cluster, until the block is left. ``user_signal``: a preempted job gets the signal it chose, not SIGTERM."""
    cluster = Cluster(folder, socket.gethostname().partition(".")[0])
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    for number in (0, 1):
        (folder / f"gpu{number}").symlink_to(os.devnull)
    controller_port, node_port = _free_ports(2)
    (folder / "slurm.conf").write_text(
        CONFIG.format(
            host=cluster.host,
            user=getpass.getuser(),
            folder=folder,
            controller_port=controller_port,
            node_port=node_port,
            parameters="SlurmctldParameters=preempt_send_user_signal" if user_signal else "",
        )
    )
    (folder / "gres.conf").write_text(f"NodeName={cluster.host} Name=gpu File={folder}/gpu[0-1]\n")
    munge = [f"--{kind}={folder}/munge.{kind.removesuffix('-file')}" for kind in ("key-file", "socket", "pid-file")]
    munge += [f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed"]
    try:
        cluster("munged", "--force", *munge)
        cluster("slurmctld", "-c")
        cluster.start_node()
        yield cluster
    finally:
        subprocess.run(["scancel", "--user", getpass.getuser()], env=cluster.environment, capture_output=True)
        for name in ("slurmd.pid", "slurmctld.pid", "munge.pid"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
                os.kill(int((folder / name).read_text()), signal.SIGTERM)


def missing() -> list[str]:
    """The programs that are not installed here; none where a cluster can be started."""
    return [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]
