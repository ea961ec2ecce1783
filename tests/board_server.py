"""Boards for tests: a real sshd on loopback that runs what is sent under an emulator, as one board per key; and a stand-in for adb on this machine.

A board's behaviour is the word in its file `NAME.mode`: empty, or what goes wrong with it.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tools import require_programs

from qcompiler.base.targets import find_target

TARGET = "arm64-dotprod"
BOARDS = ("one", "two", "three")

# The shell of a board: what is ours runs under the emulator, and tools of the board come first on PATH.
_SHELL = """\
#!/bin/sh
cd {folder}
mode=$(cat {folder}/$1.mode 2>/dev/null)
PATH={folder}/tools:$PATH
run='sh {emulator} ./qc_'
case $mode in
  full) PATH={folder}/full:$PATH ;;
  hang) run='sh {folder}/hanger ./qc_' ;;
  other) PATH={folder}/other:$PATH ;;
  garbage) head -c 100000 /dev/urandom; exit 0 ;;
  endless) exec cat /dev/zero ;;
  lie) run='sh {folder}/liar {emulator} ./qc_' ;;
  wrong) run='sh {folder}/faulty {emulator} ./qc_' ;;
  die) run='sh {folder}/killer '"$PPID"' ./qc_' ;;
esac
export PATH
eval "$(printf '%s' "$SSH_ORIGINAL_COMMAND" | sed "s#sh [.]/qc_#$run#")"
"""
_SCRIPTS = {
    "tools/uname": '#!/bin/sh\n[ "$1" = -m ] && echo aarch64 || /bin/uname "$@"\n',
    "other/uname": '#!/bin/sh\n[ "$1" = -m ] && echo riscv64 || /bin/uname "$@"\n',
    "full/tar": '#!/bin/sh\necho "tar: qc_run: Cannot write: No space left on device" >&2\nexit 2\n',
    # Wrong candidates, right canary: an emulator (or an overclocked memory) that fails now and then.
    "liar": '#!/bin/sh\n"$@"; status=$?\n[ -f results.jsonl ] && sed -i \'s/"status": "ok", "seconds": .*/"status": "wrong"}/\' results.jsonl\nexit $status\n',
    # Results with a wrong bit.
    "faulty": '#!/bin/sh\n"$@"; status=$?\n[ -f out0.npy ] && printf "\\\\377" | dd of=out0.npy bs=1 seek=200 conv=notrunc 2>/dev/null\nexit $status\n',
    "hanger": "#!/bin/sh\nexec sleep 1000\n",
    "killer": "#!/bin/sh\nkill -9 $1\nsleep 5\n",
}
_ADB = """\
#!/bin/sh
[ "$1" = -s ] || exit 1
[ "$2" = phone ] || {{ echo "adb: device '$2' not found" >&2; exit 1; }}
[ -f {folder}/locked ] && {{ echo "adb: device unauthorized." >&2; exit 1; }}
what=$3; shift 3
case $what in
  shell) exec sh -c "$*" ;;
  push|pull) exec cp "$@" ;;
esac
exit 1
"""


class Server:
    """A running sshd. `folder`: everything of it; `file`: a boards.yaml with its boards."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / "boards.yaml"
        emulator = " ".join(find_target(TARGET).emulator)
        for name, text in {**_SCRIPTS, "shell": _SHELL.format(folder=folder, emulator=emulator), "bin/adb": _ADB.format(folder=folder)}.items():
            self._script(name, text)
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            self.port = taken.getsockname()[1]
        for key in ("host", "other_host", "stranger", *BOARDS):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
        keys = [f'command="{folder}/shell {b}",restrict {(folder / f"{b}.pub").read_text()}' for b in BOARDS]
        (folder / "authorized").write_text("".join(keys))
        (folder / "known").write_text(f"[127.0.0.1]:{self.port} {(folder / 'host.pub').read_text()}")
        (folder / "changed").write_text(f"[127.0.0.1]:{self.port} {(folder / 'other_host.pub').read_text()}")
        (folder / "nothing").write_text("")
        hosts = [(b, b, "known", self.port) for b in BOARDS]
        hosts += [("changed", "one", "changed", self.port), ("unknown", "one", "nothing", self.port), ("stranger", "stranger", "known", self.port)]
        hosts += [("away", "one", "known", 1)]
        config = [
            f"Host {name}\n HostName 127.0.0.1\n Port {port}\n IdentityFile {folder}/{key}\n IdentitiesOnly yes\n UserKnownHostsFile {folder}/{known}\n"
            " GlobalKnownHostsFile none\n StrictHostKeyChecking yes\n"
            for name, key, known, port in hosts
        ]
        (folder / "config").write_text("".join(config))
        self._script("bin/ssh", f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/config "$@"\n')
        lines = [f"  {name}: {{target: {TARGET}, core: cortex-a76, ssh: {name}, folder: {folder}/work, patience: 60}}" for name, *_ in hosts]
        lines += [
            f"  phone: {{target: native, adb: phone, folder: {folder}/work}}",
            f"  lost: {{target: native, adb: lost, folder: {folder}/work}}",
            f"  here: {{target: native, local: true, folder: {folder}/work}}",
        ]
        self.file.write_text("\n".join(["boards:", *lines, ""]))
        options = [f"Port={self.port}", "ListenAddress=127.0.0.1", f"HostKey={folder}/host", f"AuthorizedKeysFile={folder}/authorized", "StrictModes=no"]
        options += ["UsePAM=no", "PasswordAuthentication=no", "KbdInteractiveAuthentication=no", f"PidFile={folder}/pid", "MaxStartups=50"]
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        program = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
        assert program is not None
        self.process = subprocess.Popen([program, "-D", "-e", "-f", "/dev/null", *(w for o in options for w in ("-o", o))], stderr=(folder / "log").open("w"))
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        raise AssertionError((folder / "log").read_text())

    def _script(self, name: str, text: str) -> None:
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)

    def mode(self, board: str, word: str) -> None:
        (self.folder / f"{board}.mode").write_text(word)

    def left(self) -> list[str]:
        """What is left of us on the boards."""
        return sorted(os.listdir(self.folder / "work")) if (self.folder / "work").exists() else []


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    require_programs("boards", "sshd", "ssh", "qemu-aarch64-static", "aarch64-linux-gnu-g++")
    server = Server(tmp_path_factory.mktemp("boards"))
    yield server
    server.process.terminate()
    server.process.wait(10)


@pytest.fixture
def server(served: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The server, with its programs first on PATH and every board well."""
    monkeypatch.setenv("PATH", f"{served.folder}/bin:{os.environ['PATH']}")
    yield served
    for name in BOARDS:
        served.mode(name, "")
    (served.folder / "locked").unlink(missing_ok=True)
