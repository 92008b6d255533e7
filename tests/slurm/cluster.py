"""A private SLURM cluster on this machine: several nodes with pretend GPUs, a partition that preempts two others.

python tests/slurm/cluster.py up FOLDER; eval "$(python tests/slurm/cluster.py env FOLDER)"
python tests/slurm/cluster.py down FOLDER
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol")
SEARCHED = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"  # an ordinary user's PATH lacks the daemons

CONF = """
ClusterName=posttrain
SlurmctldHost={host}
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CryptoType=crypto/munge
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType={proctrack}
TaskPlugin={task}
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
SlurmdTimeout=10
KillWait={kill_wait}
MinJobAge=3600
InactiveLimit=0
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=0,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{accounting}
JobAcctGatherType=jobacct_gather/none
PartitionName={partition} Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime={grace}
PartitionName=slack Nodes=ALL Default=NO MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName={urgent} Nodes=ALL Default=NO MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


DATABASE = """
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost=localhost
DbdPort={dbd}
SlurmUser={user}
LogFile={folder}/slurmdbd.log
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={sql}
StorageUser=slurm
StorageLoc=slurm
"""
ACCOUNTED = """AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort={dbd}
AccountingStoragePass={folder}/munge.socket
AccountingStoreFlags=job_comment"""


def missing() -> list[str]:
    """The programs of SLURM and munge that are not installed."""
    return [name for name in NEEDED if not shutil.which(name, path=SEARCHED)]


def up(
    folder: Path,
    nodes: int = 2,
    gpus: int = 2,
    partition: str = "normal",
    urgent: str = "urgent",
    cgroup: bool = False,
    accounting: bool = False,
    node: str = "gpu",
    **changes,
) -> None:
    """Start the daemons; everything lies in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    (folder / "state").mkdir(exist_ok=True)
    port = free_port()
    host = socket.gethostname()
    known = dict(
        folder=folder, host=host, port=port, user=user(), partition=partition, urgent=urgent, kill_wait=30, grace=0
    )
    known |= {
        "proctrack": "proctrack/cgroup" if cgroup else "proctrack/linuxproc",
        "task": "task/cgroup" if cgroup else "task/none",
    }
    known |= {"dbd": free_port(), "sql": free_port()}
    known["accounting"] = ACCOUNTED.format(**known) if accounting else "AccountingStorageType=accounting_storage/none"
    lines = [CONF.format(**known | changes)]
    gres = []
    for n in range(1, nodes + 1):
        lines.append(
            f"NodeName={node}{n} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs=8 RealMemory=16000 "
            f"Gres=gpu:fake:{gpus} State=UNKNOWN"
        )
        gres.append(f"NodeName={node}{n} Name=gpu Type=fake Count={gpus} File={folder}/card[0-{gpus - 1}]")
    for n in range(gpus):
        card = folder / f"card{n}"
        card.unlink(missing_ok=True)
        card.symlink_to("/dev/null")  # the device of a pretend GPU must be a character device
    (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
    (folder / "gres.conf").write_text("\n".join(gres) + "\n")
    (folder / "cgroup.conf").write_text(
        "CgroupAutomount=no\nConstrainRAMSpace=yes\nConstrainSwapSpace=yes\nAllowedSwapSpace=0\nConstrainDevices=no\nConstrainCores=no\n"
    )
    key = folder / "munge.key"
    if not key.exists():
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
    daemon(
        folder,
        "munged",
        f"--key-file={key}",
        f"--socket={folder}/munge.socket",
        f"--pid-file={folder}/munged.pid",
        f"--log-file={folder}/munged.log",
        f"--seed-file={folder}/munged.seed",
        "--force",
    )
    wrapper(folder)
    if accounting:
        database(folder, known)
    controller(folder)
    for n in range(1, nodes + 1):
        start_node(folder, f"{node}{n}")
    wait_until(
        lambda: (
            len(re.findall(r"^\S+ idle", run(folder, "sinfo", "-h", "-N", "-o", "%N %T", "-p", partition), re.M))
            == nodes
        ),
        "idle nodes",
        folder,
    )


def wrapper(folder: Path) -> None:
    """An `srun` that knows this cluster: inside of a job Snakemake's executor drops every SLURM_* variable."""
    at = folder / "bin" / "srun"
    at.parent.mkdir(exist_ok=True)
    at.write_text(f'#!/bin/sh\nSLURM_CONF={folder}/slurm.conf exec {shutil.which("srun", path=SEARCHED)} "$@"\n')
    at.chmod(0o755)


def environment(folder: Path) -> dict[str, str]:
    """What a process needs to talk to the cluster."""
    return {"SLURM_CONF": f"{folder}/slurm.conf", "PATH": f"{folder}/bin:{SEARCHED}"}


def database(folder: Path, known: dict) -> None:
    """Start a MariaDB of its own, and slurmdbd on it, with an account `lab` that this user may charge."""
    data, sql = folder / "sql", known["sql"]
    daemon(folder, "mariadb-install-db", f"--datadir={data}", f"--user={user()}", "--skip-test-db")
    command = ["mariadbd", f"--datadir={data}", f"--socket={data}/socket", f"--port={sql}", "--bind-address=127.0.0.1"]
    command += [f"--user={user()}", "--skip-grant-tables", f"--pid-file={folder}/mariadbd.pid"]
    with open(folder / "mariadbd.log", "w") as log:
        subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | environment(folder))
    wait_until(lambda: listens(sql), "MariaDB", folder)
    conf = folder / "slurmdbd.conf"
    conf.write_text(DATABASE.format(**known))
    conf.chmod(0o600)
    daemon(folder, "slurmdbd")
    wait_until(lambda: listens(known["dbd"]), "slurmdbd", folder)
    for add in (["cluster", "posttrain"], ["account", "lab"], ["user", user(), "account=lab"]):
        run(folder, "sacctmgr", "-i", "add", *add)


def listens(port: int) -> bool:
    """Whether something answers on a port of this machine."""
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def controller(folder: Path) -> None:
    """Start slurmctld."""
    daemon(folder, "slurmctld", "-f", f"{folder}/slurm.conf")


def start_node(folder: Path, name: str) -> None:
    """Start the slurmd of a node."""
    (folder / f"spool-{name}").mkdir(exist_ok=True)
    daemon(folder, "slurmd", "-N", name, "-f", f"{folder}/slurm.conf")


def stop(folder: Path, name: str, how: int = signal.SIGTERM) -> None:
    """Stop a daemon by its pid file: a node's name, slurmctld, munged."""
    file = folder / f"{name}.pid"
    try:
        os.kill(int(file.read_text()), how)
    except (OSError, ValueError):
        return


def down(folder: Path) -> None:
    """Stop the daemons, and everything else that belongs to the cluster."""
    names = [file.stem for file in folder.glob("*.pid")]
    for name in sorted(names, key=lambda name: (name == "munged", name == "slurmctld")):
        stop(folder, name)
    time.sleep(1)
    for name in names:
        stop(folder, name, signal.SIGKILL)
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if (
                f"SLURM_CONF={folder}/".encode() in Path(f"/proc/{pid}/environ").read_bytes()
                and int(pid) != os.getpid()
            ):
                os.kill(int(pid), signal.SIGKILL)


def run(folder: Path, *command: str) -> str:
    """The output of a SLURM command."""
    found = subprocess.run(command, env=os.environ | environment(folder), capture_output=True, text=True)
    if found.returncode:
        raise RuntimeError(f"{' '.join(command)}: {found.stderr}")
    return found.stdout


def daemon(folder: Path, *command: str) -> None:
    """Start a program that goes to the background by itself."""
    found = subprocess.run(command, env=os.environ | environment(folder), capture_output=True, text=True)
    if found.returncode:
        raise RuntimeError(f"{' '.join(command)}: {found.stdout}{found.stderr}")


def wait_until(true, what: str, folder: Path, seconds: float = 180) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise RuntimeError(f"no {what} after {seconds} s: see {folder}/slurmctld.log")
        time.sleep(0.1)


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as one:
        one.bind(("", 0))
        return one.getsockname()[1]


def user() -> str:
    """The name of the user that runs this."""
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name


if __name__ == "__main__":
    what, folder = sys.argv[1], Path(sys.argv[2]).resolve()
    if what == "up":
        up(folder, accounting="accounting" in sys.argv)
    elif what == "down":
        down(folder)
    else:
        print(f"export SLURM_CONF={folder}/slurm.conf PATH={folder}/bin:$PATH:/usr/sbin")
