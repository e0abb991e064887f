"""Hosts on one machine: network namespaces with addresses of their own, joined by a bridge.

Needs root and iproute2. A relay stands for the delay that not every kernel can give a link.
"""

import contextlib
import ctypes
import itertools
import os
import select
import shlex
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_NAMES = itertools.count()
_CLONE_NEWNET, _CLONE_NEWUTS = 0x4000_0000, 0x400_0000  # of Linux's linux/sched.h


def ip(*words: Any) -> None:
    """Runs `ip`; raises with what it says."""
    ended = subprocess.run(["ip", *map(str, words)], capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"ip {words}: {ended.stderr.strip()}: root and iproute2 are needed")


@dataclass(frozen=True)
class Node:
    """One host.

    Attributes:
        name: of its namespace, and its host name.
        address: its address.
        link: its end of the cable, on the bridge's side.
        gateway: the bridge's address, where this machine itself answers.
    """

    name: str
    address: str
    link: str
    gateway: str

    def command(self, *words: Any) -> list[str]:
        """A command line that runs on this host, under its name."""
        renamed = ["unshare", "--uts", "sh", "-c", f'hostname {self.name}; exec "$@"', "sh"]
        return ["ip", "netns", "exec", self.name, *renamed, *map(str, words)]

    def enter(self) -> None:
        """Has this process run on this host from now on, under its name."""
        system = ctypes.CDLL(None, use_errno=True)
        with open(f"/run/netns/{self.name}") as space:
            failed = system.setns(space.fileno(), _CLONE_NEWNET) or system.unshare(_CLONE_NEWUTS)
        if failed:
            raise OSError(ctypes.get_errno(), f"entering {self.name}")
        socket.sethostname(self.name)

    @property
    def environment(self) -> dict[str, str]:
        """By which gloo finds the way to the other hosts."""
        return {"GLOO_SOCKET_IFNAME": "eth0"}

    def processes(self) -> list[str]:
        """What runs on it, by process id."""
        listed = ["ip", "netns", "pids", self.name]
        return subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split()

    def plug(self, connected: bool) -> None:
        """Plugs its cable in, or pulls it."""
        ip("link", "set", self.link, "up" if connected else "down")


@contextlib.contextmanager
def nodes(count: int) -> Iterator[list[Node]]:
    """Hosts that see each other and nothing else; gone at the end."""
    mark = f"{os.getpid() % 10_000}x{next(_NAMES)}"
    bridge, subnet = f"cdb{mark}", f"10.{os.getpid() % 200 + 20}.{next(_NAMES) % 250}"
    made: list[Node] = []
    ip("link", "add", bridge, "type", "bridge")
    try:
        gateway = f"{subnet}.254"
        ip("address", "add", f"{gateway}/24", "dev", bridge)
        ip("link", "set", bridge, "up")
        for i in range(count):
            node = Node(f"node{mark}n{i}", f"{subnet}.{i + 1}", f"cd{mark}n{i}", gateway)
            ip("netns", "add", node.name)
            made.append(node)
            ip("link", "add", node.link, "type", "veth", "peer", "eth0", "netns", node.name)
            ip("link", "set", node.link, "master", bridge, "up")
            ip("-n", node.name, "address", "add", f"{node.address}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                ip("-n", node.name, "link", "set", device, "up")
        yield made
    finally:
        for node in made:
            with contextlib.suppress(RuntimeError):
                ip("netns", "delete", node.name)
        with contextlib.suppress(RuntimeError):
            ip("link", "delete", bridge)


def agent(hosts: list[Node], folder: Path) -> Path:
    """A script that stands for ssh: `agent ADDRESS COMMAND...` runs it there in a shell.

    Like ssh, it takes nothing else of the environment along.
    """
    ways = "\n".join(f"{h.address}) set -- {shlex.join(h.command('sh', '-c'))} ;;" for h in hosts)
    script = folder / "agent"
    script.write_text(f"""#!/bin/sh
host=$1; shift; command=$*
case $host in
{ways}
*) echo "no host $host" >&2; exit 255 ;;
esac
exec env -i HOME="$HOME" PATH="$PATH" "$@" "$command"
""")
    script.chmod(0o755)
    return script


class Relay:
    """Passes connections on to another address, later than they came.

    Args:
        target: host and port that it stands before.
        delay_s: how much later each message arrives.
    """

    def __init__(self, target: tuple[str, int], delay_s: float) -> None:
        self._target, self._delay = target, delay_s
        self._listener = socket.create_server(("", 0))
        self.port: int = self._listener.getsockname()[1]
        self.passed = 0
        self._silent = threading.Event()
        self._ends: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Closes all connections that it has; new ones are welcome."""
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def fall_silent(self) -> None:
        """From now on takes everything and passes nothing on."""
        self._silent.set()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        with contextlib.suppress(OSError), near:
            far = socket.create_connection(self._target, timeout=5)
            self._ends += [near, far]
            with far:
                while True:
                    for source in select.select([near, far], [], [])[0]:
                        data = source.recv(2**16)
                        if not data:
                            return
                        if self._silent.is_set():
                            continue
                        time.sleep(self._delay)
                        self.passed += 1
                        (far if source is near else near).sendall(data)
