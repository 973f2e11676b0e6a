"""Tests of ftp_server.py and ftp_client.py: real loopback sockets, real processes, every server test in both modes.

    python -m pytest test_ftp.py                  everything, in about 80 seconds on two cores
    python -m pytest test_ftp.py -k selectors     one mode
    python -m pytest test_ftp.py -k symlink       one subject

The tests look at the scripts from outside only. A test of the server talks to a server process through a Peer,
which sends exactly the bytes that the test names and reads no more than it asks for. A test of the client runs
the client as a process, against a real server, a Proxy that cuts or holds the line, or a fake_server that lies.
Disks that fill and processes that die are real too: see FAULTS. Nothing leaves the loopback interface.

Reading order: helpers, fixtures; then the server: messages, session by hand, transfers, refusals, files under
faults, broken peers, concurrency, shutdown, classic; then the command lines: server, client, prompt.
"""

import argparse
import array
import collections
import contextlib
import decimal
import errno
import functools
import glob
import hashlib
import inspect
import itertools
import json
import math
import ntpath
import os
import random
import re
import select
import selectors
import shlex
import shutil
import signal
import socket
import sqlite3
import stat
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

try:
    import pytest
except ImportError:  # the benchmark, at the end, runs without it
    pytest = mock.MagicMock()

try:
    import fcntl
    import pty
    import termios
except ImportError:  # Windows
    pty = None

import ftp_client
import ftp_server

pytestmark = pytest.mark.filterwarnings("error")  # an unclosed socket, file or process fails the test

HERE = os.path.dirname(os.path.abspath(__file__))
SERVER = os.path.join(HERE, "ftp_server.py")
CLIENT = os.path.join(HERE, "ftp_client.py")
PYTHON = [sys.executable, "-W", "error"]
ENVIRONMENT = dict(os.environ, LC_ALL="C.UTF-8", PYTHONIOENCODING="utf-8")
ENVIRONMENT.pop("PYTHONDONTWRITEBYTECODE", None)  # launch() imports the scripts: compiled once, not for each process
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a background job, whose children would ignore it too
    signal.signal(signal.SIGINT, signal.default_int_handler)
PATIENCE = 20  # seconds: nothing here takes so long unless it hangs
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
CHUNKS = [64 * KIB, 256 * KIB, MIB]
SIZES = [0, 1] + [chunk + difference for chunk in CHUNKS for difference in (-1, 0, 1)]

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX files, stamps or signals")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc or asks the Linux kernel")
terminal = pytest.mark.skipif(pty is None, reason="needs a pseudo-terminal")
both_scripts = pytest.mark.parametrize("module", [ftp_server, ftp_client], ids=["server", "client"])


# ==== Helpers: content, waiting, tables of cases ====================================================================


def content(size, seed=0):
    """Return size bytes that look like nothing else."""
    return random.Random(seed).getrandbits(8 * size + 1).to_bytes(size + 1, "little")[:size]


def sha(data):
    return hashlib.sha256(data).hexdigest()


counter = itertools.count(1)


def unique(extension="bin"):
    """Return a name that no other test uses."""
    return "file%d.%s" % (next(counter), extension)


def upload_id():
    return sha(b"upload %d" % next(counter))


def wait_for(condition, seconds=PATIENCE):
    """Return condition()'s first true value; fail after so many seconds."""
    deadline = time.monotonic() + seconds
    for pause in itertools.chain([0.001, 0.002, 0.004], itertools.repeat(0.008)):
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, "waited %s seconds in vain" % seconds
        time.sleep(pause)


def at_once(*functions):
    """Call functions in threads from a common start; return their results in order."""
    start = threading.Barrier(len(functions))

    def call(function):
        start.wait(PATIENCE)
        return function()

    with ThreadPoolExecutor(len(functions)) as pool:
        return list(pool.map(call, functions))


def cases(arguments, table):
    """Parametrize a test by a dictionary of id and value (or values)."""
    return pytest.mark.parametrize(arguments, list(table.values()), ids=list(table))


def tree(folder, hidden=False):
    """Return {relative name: content} of all under folder: None for a folder, "special" for a link or a FIFO."""
    found = {}
    for path, folders, files in os.walk(str(folder)):
        if not hidden:
            folders[:] = [name for name in folders if not name.startswith(".")]
            files = [name for name in files if not name.startswith(".")]
        for name in folders + files:
            full = os.path.join(path, name)
            relative = os.path.relpath(full, str(folder)).replace(os.sep, "/")
            with contextlib.suppress(FileNotFoundError):  # gone meanwhile
                kind = stat.S_IFMT(os.lstat(full).st_mode)
                found[relative] = (read_bytes(full) if kind == stat.S_IFREG else
                                   None if kind == stat.S_IFDIR else "special")
    return found


def read_bytes(path):
    with open(str(path), "rb") as file:
        return file.read()


def removed(path):
    """Remove a file, if it is there; False where that is not to be, as on Windows while somebody reads it."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    except PermissionError:
        return False
    return True


def read_text(path):
    """Return the text in a file, whichever line ends it has."""
    return read_bytes(path).decode("utf-8").replace("\r\n", "\n")


def is_locked(path):
    """Tell whether a process has a file locked, by Linux' own list: to try it would be to lock it."""
    return b":%d " % os.stat(path).st_ino in read_bytes("/proc/locks")


def sparse(path, size):
    """Make a file of size zero bytes that takes no room on the disk."""
    with open(str(path), "wb") as file:
        file.truncate(size)


def modified(path):
    return os.stat(str(path)).st_mtime


def fill(folder, files):
    """Make files, and folders where the content is None; return the path of the last."""
    for name, data in files.items():
        path = os.path.join(str(folder), *name.split("/"))
        os.makedirs(path if data is None else os.path.dirname(path), exist_ok=True)
        if data is not None:
            with open(path, "wb") as file:
                file.write(data)
    return path


# ==== Helpers: a connection by hand =================================================================================


class Hangup(ConnectionError):
    """The other end closed where the test expected an answer."""


def wire(part):
    """Return part as it crosses the wire: dictionaries as header lines, text as UTF-8."""
    if isinstance(part, dict):
        part = json.dumps(part) + "\n"
    return part.encode("utf-8") if isinstance(part, str) else part


class Peer:
    """One end of a connection that sends exactly what a test says. No line that it reads may hold the secret."""

    def __init__(self, sock, secret="\0"):
        self.sock, self.secret = sock, secret
        sock.settimeout(PATIENCE)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.file = sock.makefile("rb")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def close(self):
        self.file.close()
        self.sock.close()

    def reset(self):
        """Break the connection the hard way: RST instead of FIN."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def send(self, *parts):
        self.sock.sendall(b"".join(wire(part) for part in parts))

    def dribble(self, data, pause=0.0):
        """Send data a byte at a time."""
        for byte in wire(data):
            self.sock.sendall(bytes([byte]))
            time.sleep(pause)

    def read(self, count):
        data = self.file.read(count)
        if len(data) < count:
            raise Hangup("stream ends after %d bytes, expected %d" % (len(data), count))
        return data

    def line(self):
        """Read one header line; raise Hangup where the stream ends."""
        line = self.file.readline(2 * 65536)
        if not line:
            raise Hangup("no answer")
        assert line.endswith(b"\n") and len(line) <= 65536
        assert self.secret not in line.decode("utf-8"), "a path of the server on the wire"
        answer = json.loads(line.decode("utf-8"))
        assert isinstance(answer, dict)
        if answer.get("ok") is False:
            assert answer["code"] in CODES and answer["error"]
        return answer

    def closed(self):
        """Wait for the end of the stream; false if something else comes."""
        try:
            return self.file.read(1) == b""
        except ConnectionError:
            return True

    def rest(self):
        """Return all bytes until the other end closes."""
        pieces = []
        with contextlib.suppress(ConnectionError):
            for piece in iter(lambda: self.file.read(65536), b""):
                pieces.append(piece)
        return b"".join(pieces)

    def ask(self, *parts):
        self.send(*parts)
        return self.line()

    def rest_or_no(self):
        """Return what comes until the other end closes, or the classic refusal, after which it need not close."""
        answer = b""
        with contextlib.suppress(ConnectionError):
            for byte in iter(lambda: self.file.read(1), b""):
                answer += byte
                if answer == b"NO|0":
                    break
        return answer

    def hello(self):
        return self.ask({"cmd": "hello"})

    def put(self, name, data, **header):
        """Put data under name in one go, from header's offset on; return the answer."""
        return self.ask(put_header(name, data, **header), data[header.get("offset", 0):], {"sha256": sha(data)})

    def get(self, name, **header):
        """Return the answer, the payload and the last line of a get."""
        answer = self.ask(dict({"cmd": "get", "name": name}, **header))
        if not answer["ok"]:
            return answer, None, None
        return answer, self.read(answer["size"] - answer["offset"]), self.line()

    def ls(self, path="", **header):
        """Return a listing as {name: entry}."""
        answer = self.ask(dict({"cmd": "ls", "path": path}, **header))
        assert answer["ok"], answer
        lines = self.read(answer["size"]).decode("utf-8").splitlines()
        entries = [json.loads(line) for line in lines]
        assert all(entry["type"] in ("file", "dir") for entry in entries)
        return {entry["name"]: entry for entry in entries}


def put_header(name, data, **header):
    return dict({"cmd": "put", "name": name, "size": len(data)}, **header)


def says_ok(stream):
    return b'"ok":true' in stream.replace(b" ", b"")


CODES = ("bad-request bad-name not-found not-a-file denied too-large disk-full busy mismatch changed timeout "
         "server-error").split()


# ==== Helpers: faults in a real process =============================================================================

FAULTS = r'''
# Runs inside the process under test before anything of ours: wraps functions of os, files and the start of threads,
# so that the call which the plan names fails, dies, or is held for as long as the plan stays. See class Faults.
import builtins, io, json, os, signal, stat, threading, time

PLAN, real_open, real_fstat = os.environ["FAULT_PLAN"], open, os.fstat
lock, current = threading.Lock(), {"text": "", "calls": 0}

def read_plan():
    try:
        with real_open(PLAN) as file:
            return file.read()
    except OSError:
        return ""

def strike(name):
    with lock:
        text = read_plan()
        if text != current["text"]:
            current.update(text=text, calls=0)
        plan = json.loads(text or '{"operations": []}')
        if name not in plan["operations"]:
            return
        current["calls"] += 1
        if not plan["first"] <= current["calls"] <= plan["last"]:
            return
        with real_open(PLAN + ".struck", "a") as file:
            file.write(name + "\n")
    if plan["kind"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif plan["kind"] == "raise":
        raise OSError(plan["error"], os.strerror(plan["error"]))
    deadline = time.monotonic() + 30
    while read_plan() == text and time.monotonic() < deadline:
        time.sleep(0.01)

class Faulty:
    def __init__(self, name, real):
        self.name, self.real = name, real
    def __call__(self, *args, **kwargs):
        if self.name != "splice" or stat.S_ISREG(real_fstat(args[1]).st_mode):  # else into a pipe: no disk's business
            strike(self.name)
        return self.real(*args, **kwargs)

for name in os.environ["FAULT_OPERATIONS"].split():
    if hasattr(os, name):
        real = getattr(os, name)
        setattr(os, name, Faulty(name, real))
        for group in (os.supports_dir_fd, os.supports_fd, os.supports_follow_symlinks):
            if real in group:
                group.add(getattr(os, name))

class FaultyFile(io.FileIO):
    def write(self, data):
        strike("write")
        return super().write(data)
    def truncate(self, size=None):
        strike("truncate")
        return super().truncate(size)
    def readinto(self, view):
        strike("read")
        return super().readinto(view)
    def read(self, size=-1):
        strike("read")
        return super().read(size)

def faulty_open(file, mode="r", buffering=-1, *args, opener=None, **kwargs):
    if "b" not in mode:
        return real_open(file, mode, buffering, *args, opener=opener, **kwargs)
    strike("open")
    raw = FaultyFile(file, mode.replace("b", ""), opener=opener)
    kind = io.BufferedRandom if "+" in mode else io.BufferedReader if "r" in mode else io.BufferedWriter
    return raw if buffering == 0 else kind(raw)

def faulty_start(self, start=threading.Thread.start):
    try:
        strike("thread")
    except OSError:
        raise RuntimeError("can't start new thread") from None
    start(self)

io.FileIO, io.open, builtins.open, threading.Thread.start = FaultyFile, faulty_open, faulty_open, faulty_start
'''
CHANGING = ("open mkdir write writev pwrite splice truncate ftruncate posix_fallocate utime chmod fsync fdatasync "
            "link rename replace unlink remove rmdir").split()
READING = "open stat lstat fstat read readv pread preadv sendfile scandir listdir".split()
FLUSHING = ["fsync", "fdatasync"]
PUBLISHING = ["link", "rename", "replace"]

LAUNCH = """
import sys
here, module, patch = sys.argv[1:4]
del sys.argv[1:4]
sys.path.insert(0, here)
exec(patch)
script = __import__(module)
if module == "ftp_server":
    script.TICK = 0.005  # tests wait for the stop of nearly each server
    script.Stoppable.serve_forever.__defaults__ = (script.TICK,)
sys.exit(script.main(sys.argv[1:]))
"""

DROP_PRIVILEGES = """
import ctypes, struct  # even root must ask for a file's permission bits once its capabilities are gone
assert ctypes.CDLL(None).capset(struct.pack("Ii", 0x20080522, 0), bytes(24)) == 0
"""


def launch(script, patch=""):
    """Return the command that runs a script, with a patch to its process."""
    return PYTHON + ["-c", LAUNCH, HERE, os.path.basename(script)[:-3], patch]


TEMPLATE = """
# Has imported the scripts, and forks itself for each process that is asked for: a line of JSON and its open files.
import array, gc, json, os, signal, socket, struct, sys
here, number = sys.argv[1:]
sys.path.insert(0, here)
import ftp_client, ftp_server
requests = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, int(number))
if hasattr(gc, "freeze"):
    gc.freeze()  # a process need not look at what was here before it
signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the keepers
while True:
    line, ancillary = requests.recvmsg(65536, socket.CMSG_SPACE(64))[:2]
    if not line:
        requests.close()
        sys.exit()
    while not line.endswith(b"\\n"):
        line += requests.recv(65536) or sys.exit()
    files = array.array("i", ancillary[0][2])
    if not os.fork():
        break
    for file in files:
        os.close(file)

# The keeper of one process: starts it, waits for it, reports both.
requests.close()
signal.signal(signal.SIGCHLD, signal.SIG_DFL)
report = files.pop()
process = os.fork()
if process:
    os.write(report, struct.pack("i", process))
    status = os.waitpid(process, 0)[1]
    os.write(report, struct.pack("i", -(status & 127) or status >> 8))
    os._exit(0)
signal.signal(signal.SIGINT, signal.default_int_handler)
os.close(report)
for number, file in enumerate(files):
    os.dup2(file, number)
    os.close(file)
request = json.loads(line.decode("ascii"))
os.chdir(request["cwd"])
os.environ.clear()
os.environ.update(request["environment"])
launch, *sys.argv[1:] = request["arguments"]
if sys.argv[3]:
    del sys.modules[sys.argv[2]]  # a patch comes before the import
exec(launch)
"""


class Forked:
    """A process of a script, forked from the template: it starts in a fraction of the time that Python needs.

    It has what the tests use of subprocess.Popen.
    """

    template, lock = None, threading.Lock()  # the socket to the template, where the platform has what it needs

    def __init__(self, command, cwd, environment, *files):
        assert command[:len(PYTHON) + 1] == PYTHON + ["-c"]
        request = {"arguments": [os.fsdecode(word) for word in command[len(PYTHON) + 1:]], "cwd": cwd,
                   "environment": environment}
        reports, report = os.pipe()
        self.report = open(reports, "rb", 0)  # left open, as of a process that nobody waits for, it fails the test
        numbers = array.array("i", [file.fileno() for file in files] + [report])
        line = json.dumps(request).encode("ascii") + b"\n"
        with self.lock:
            sent = self.template.sendmsg([line], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)])
            self.template.sendall(line[sent:])
            os.close(report)
            self.returncode, self.pid = None, self.reported()

    def reported(self):
        return struct.unpack("i", self.report.read(4))[0]

    def wait(self, timeout):
        if self.returncode is None:
            if not select.select([self.report], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("process %d" % self.pid, timeout)
            self.returncode = self.reported()
            self.report.close()
        return self.returncode

    def poll(self):
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)

    def send_signal(self, number):
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # has ended since
                os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def start(command, cwd, environment, *files):
    """Start a process with a changed environment and these open files as its standard streams; return it."""
    at_its_start = [name for name in environment if name.startswith(("PYTHON", "LC_"))]  # is read by Python
    environment = dict(ENVIRONMENT, **environment)
    if Forked.template and LAUNCH in command and not at_its_start:
        return Forked(command, cwd, environment, *files)
    return subprocess.Popen(command, cwd=cwd, env=environment, stdin=files[0], stdout=files[1], stderr=files[2])


@contextlib.contextmanager
def running_template():
    """Let start() fork what launch() names from a template while the block runs, where the platform can."""
    if not hasattr(os, "fork") or not hasattr(socket, "SCM_RIGHTS"):
        yield
        return
    Forked.template, its = socket.socketpair()
    with its:
        process = subprocess.Popen(PYTHON + ["-c", TEMPLATE, HERE, str(its.fileno())], pass_fds=[its.fileno()],
                                   env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        Forked.template.close()  # at which it ends
        Forked.template = None
        process.wait(PATIENCE)


class Faults:
    """The plan of faults for one process: which call of which functions does what, from arm() to disarm()."""

    def __init__(self, folder):
        self.path = os.path.join(str(folder), "plan%d.json" % next(counter))
        operations = " ".join(sorted(set(CHANGING + READING)))
        self.environment = {"FAULT_PLAN": self.path, "FAULT_OPERATIONS": operations}

    def arm(self, kind, operations=CHANGING, at=1, last=None, error=errno.EIO):
        """Let call number `at` (to `last`) of the operations fail: kind is kill, raise or hold."""
        self.disarm()
        plan = {"kind": kind, "operations": operations, "first": at, "last": last or at, "error": error,
                "number": next(counter)}
        with open(self.path + ".new", "w") as file:
            json.dump(plan, file)
        os.replace(self.path + ".new", self.path)

    def disarm(self):
        """Take the plan away; what is held goes on."""
        for path in (self.path, self.path + ".struck"):
            wait_for(lambda: removed(path))

    def struck(self, count=1):
        """Say whether so many calls failed or are held."""
        return os.path.exists(self.path + ".struck") and read_bytes(self.path + ".struck").count(b"\n") >= count


# ==== Helpers: servers, clients, proxies ============================================================================

TRACES = re.compile(r"Traceback|Exception ignored|Exception in thread|\w+Warning\b|[\0-\x09\x0b-\x1f\x7f-\x9f]")


class Server:
    """One server process with its folders and its log. It writes to files, so nobody need read along."""

    def __init__(self, mode, folder, options, host="127.0.0.1", port=0, patch="", faults=None, environment=()):
        self.mode, self.host, self.folder, self.stopped = mode, host, str(folder), False
        self.root = os.path.join(self.folder, "root")
        self.upload, self.download = os.path.join(self.root, "upload"), os.path.join(self.root, "download")
        os.makedirs(self.root, exist_ok=True)
        self.out_path = os.path.join(self.folder, "out%d.txt" % next(counter))
        self.log_path = os.path.join(self.folder, "log%d.txt" % next(counter))
        if faults:
            patch, environment = FAULTS + patch, dict(environment, **faults.environment)
        command = launch(SERVER, patch) + [host, str(port), "--mode", mode, "--root", self.root]
        with open(os.devnull) as nothing, open(self.out_path, "wb") as out, open(self.log_path, "wb") as log:
            self.process = start(command + list(options), HERE, dict(environment), nothing, out, log)

    def wait_until_listening(self):
        wait_for(lambda: self.process.poll() is not None or b"\n" in read_bytes(self.out_path))
        first = self.out().split("\n")[0]
        match = re.match(r"listening on (.+):(\d+) \((\w+)\)$", first)
        assert match, "the server did not start: %r %s" % (first, self.log())
        assert match.group(3) == self.mode
        self.port = int(match.group(2))

    def out(self):
        return read_text(self.out_path)

    def log(self):
        return read_text(self.log_path)

    def check_log(self, start=0):
        """Fail if a traceback, a warning of Python's or a raw control character stands in the log."""
        log = self.log()[start:]
        trace = TRACES.search(log)
        assert not trace, log[max(0, trace.start() - 500):trace.start() + 2000]

    def peer(self):
        return Peer(socket.create_connection((self.host, self.port), PATIENCE), secret=self.folder)

    def slow_peer(self, buffer=4096):
        """A peer with so small a receive buffer that the server feels when it doesn't read."""
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        sock.connect((self.host, self.port))
        return Peer(sock, secret=self.folder)

    def alive(self):
        """Say whether a new client is answered."""
        with self.peer() as peer:
            return peer.hello()["ok"]

    def uploads(self):
        """Return {name: content} of the upload folder."""
        return tree(self.upload)

    def stored(self, name):
        """Return the content of one file of the upload folder, or None."""
        with contextlib.suppress(FileNotFoundError, PermissionError):  # Windows shares no file that just gets its name
            return read_bytes(os.path.join(self.upload, *name.split("/")))

    def partials(self):
        """Return {name: size} of what lies in the partial folder."""
        folder, sizes = os.path.join(self.upload, ".partial"), {}
        for name in os.listdir(folder) if os.path.isdir(folder) else ():
            with contextlib.suppress(FileNotFoundError):  # gone meanwhile
                sizes[name] = os.stat(os.path.join(folder, name)).st_size
        return sizes

    def serves(self, name, data):
        """Lay a file into the download folder; return its path."""
        return fill(self.download, {name: data})

    def begin_upload(self, name, data, count, cut=False, **header):
        """Send a put's header and the first count bytes of data; return the peer once they are in a partial."""
        before = set(self.partials())
        peer = self.peer()
        peer.send(put_header(name, data, **header), data[header.get("offset", 0):count])
        if cut:
            peer.close()
        wait_for(lambda: count in self.new_partials(before))
        return peer

    def new_partials(self, before):
        return [size for name, size in self.partials().items() if name not in before]

    def cut_upload(self, name, data, count, **header):
        """Break an upload after count bytes; return when the server has put away what it got."""
        before = set(self.partials())
        self.begin_upload(name, data, count, cut=True, **header)
        wait_for(lambda: self.new_partials(before) == [count])

    def stop(self, how=signal.SIGTERM):
        """Ask the server to stop: it exits with 0, at most 3 s after STOP_TIME, and its log is clean.

        A busy machine may be late; a stop that waits for a disk or a hash would take far longer.
        """
        if not self.stopped:
            assert self.process.poll() is None, "the server has died: " + self.log()
            start = time.monotonic()
            self.process.send_signal(how)
            code = self.process.wait(PATIENCE)
            self.stop_took = time.monotonic() - start
            assert self.stop_took < ftp_server.STOP_TIME + 3, "the server took its time to stop"
            assert code == 0 or os.name != "posix", self.log()
            self.stopped = True
        self.check_log()

    def kill(self):
        """End the process at once (kill -9), or see that it has ended."""
        self.process.kill()
        self.process.wait(PATIENCE)
        self.stopped = True

    def open_descriptors(self):
        return len(os.listdir("/proc/%d/fd" % self.process.pid))

    def peak_memory(self):
        status = read_bytes("/proc/%d/status" % self.process.pid)
        return int(re.search(rb"VmHWM:\s+(\d+) kB", status).group(1)) * KIB


@contextlib.contextmanager
def serve(mode, folder, *options, **how):
    """Run a server with folder/root as its root while the block runs; then it must stop well."""
    server = Server(mode, folder, options, **how)
    try:
        server.wait_until_listening()
        yield server
        server.stop()
    finally:
        server.kill()


Done = collections.namedtuple("Done", "code out err")


def run(command, cwd, given="", seconds=60, environment=()):
    """Run a process to its end with given as its standard input; return its exit code and what it printed."""
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        stdin.write(given.encode("utf-8", "surrogateescape"))
        stdin.seek(0)
        process = start(command, str(cwd), dict(environment), stdin, stdout, stderr)
        try:
            code = process.wait(seconds)
        finally:
            process.kill()
            process.wait(PATIENCE)
        texts = []
        for file in (stdout, stderr):
            file.seek(0)
            texts.append(file.read().decode("utf-8").replace("\r\n", "\n"))
            assert not TRACES.search(texts[-1].replace("\r", "").replace("\t", "")), texts[-1]
    return Done(code, *texts)


def listen(backlog=50):
    """Return a listening socket on a free port."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen(backlog)
    return sock


class Proxy:
    """Pass bytes on between clients and a server, count them, and cut or hold the line where a test says.

    cuts: for each connection in turn, (direction, count): break it after so many bytes "up" or "down".
    hold: (direction, count): stop there until release() is called, or pass on a piece after every pause.
    """

    def __init__(self, port, cuts=(), hold=None, pause=PATIENCE):
        self.target, self.cuts, self.hold, self.pause = port, list(cuts), hold, pause
        self.moved = {"up": 0, "down": 0}
        self.connections = 0
        self.held, self.gate = threading.Event(), threading.Event()
        self.sockets, self.threads = [], []
        self.listener = listen()
        self.port = self.listener.getsockname()[1]
        self.start(self.accept)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.release()
        for sock in [self.listener] + self.sockets:
            shut(sock)
        for thread in self.threads:
            thread.join(PATIENCE)
        for sock in [self.listener] + self.sockets:
            sock.close()

    def release(self):
        self.gate.set()

    def start(self, function, *args):
        thread = threading.Thread(target=function, args=args)
        self.threads.append(thread)
        thread.start()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                client = self.listener.accept()[0]
                server = socket.create_connection(("127.0.0.1", self.target), PATIENCE)
                self.sockets += [client, server]
                self.connections += 1
                cut = self.cuts.pop(0) if self.cuts else (None, 0)
                self.start(self.pump, client, server, "up", cut)
                self.start(self.pump, server, client, "down", cut)

    def pump(self, source, sink, direction, cut):
        """Copy one direction of one connection."""
        passed = 0
        with contextlib.suppress(OSError):
            for data in iter(lambda: source.recv(65536), b""):
                limit = max(cut[1] - passed, 0) if cut[0] == direction else len(data)
                sink.sendall(data[:limit])
                passed += len(data[:limit])
                self.moved[direction] += len(data[:limit])
                if limit < len(data):
                    break
                if self.hold and self.hold[0] == direction and passed >= self.hold[1]:
                    self.held.set()
                    self.gate.wait(self.pause)
        shut(source)
        shut(sink)


def shut(sock):
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    if sys.platform == "darwin" or os.name == "nt":  # a shutdown does not wake accept there
        sock.close()


HELLO = {"ok": True, "server": "ftp_server", "version": "1", "mode": "selectors", "protocol": 2, "max_size": None}


@contextlib.contextmanager
def fake_server(hello=None, **verbs):
    """Be a server that answers each command as scripted; yield its port and the headers that it read.

    A script is a dictionary (sent as a header line), bytes (sent, then the line is cut), or a function(peer, header).
    """
    verbs["hello"] = hello or HELLO
    headers, peers = [], []
    listener = listen()

    def talk(peer):
        with contextlib.suppress(OSError, ValueError), peer:
            while True:
                header = peer.line()
                headers.append(header)
                script = verbs.get(header["cmd"], {"ok": False, "code": "not-found", "error": "no such file"})
                if callable(script):
                    script(peer, header)
                else:
                    peer.send(script)
                if isinstance(script, bytes):
                    return

    def accept(pool):
        with contextlib.suppress(OSError):
            while True:
                peers.append(Peer(listener.accept()[0]))
                pool.submit(talk, peers[-1])

    with ThreadPoolExecutor(10) as pool:
        pool.submit(accept, pool)
        try:
            yield listener.getsockname()[1], headers
        finally:
            for sock in [listener] + [peer.sock for peer in peers]:
                shut(sock)
            listener.close()


# ==== Fixtures: a server in every mode ==============================================================================


@pytest.fixture(scope="session", autouse=True)
def template():
    with running_template():
        yield


@pytest.fixture(scope="module", params=sorted(ftp_server.MODES))
def mode(request):
    return request.param


def in_place_of(test, run_test, own, *fixtures):
    """Let pytest see run_test as test, with these fixtures in place of its own first parameters."""
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in fixtures]
    run_test.__name__ = test.__name__
    run_test.__signature__ = inspect.Signature(parameters + list(inspect.signature(test).parameters.values())[own:])
    return run_test


def at_once_for(table):
    """Run a test(value, folder, ...) that waits or starts processes for all of {name: value}, a few at the same time."""
    def decorate(test):
        def run_test(tmp_path, **arguments):
            def run_one(name, value, folder):
                folder.mkdir()
                try:
                    test(value, folder, **arguments)
                except Exception as error:
                    raise AssertionError("it fails for %s" % name) from error

            with ThreadPoolExecutor(4) as pool:
                folders = [tmp_path / str(number) for number in range(len(table))]
                list(pool.map(run_one, table, table.values(), folders))

        return in_place_of(test, run_test, 2, "tmp_path")
    return decorate


in_all_modes_at_once = at_once_for({mode: mode for mode in ftp_server.MODES})


def early(test):
    """Start a test(folder, ...) that mostly waits when the first of its kind is to run: they all wait together."""
    def run_test(started, request, **arguments):
        started[request.node.name].result()

    run_test.waiting = test
    return in_place_of(test, run_test, 1, "started", "request")


@pytest.fixture(scope="session")
def started(request, tmp_path_factory):
    """The early tests that were selected, all under way: {name: its future}."""
    chosen = [item for item in request.session.items if hasattr(item.function, "waiting")]
    with ThreadPoolExecutor(len(chosen)) as pool:
        yield {item.name: pool.submit(item.function.waiting, tmp_path_factory.mktemp("early"),
                                      **(item.callspec.params if hasattr(item, "callspec") else {})) for item in chosen}


@pytest.fixture(scope="module")
def shared(mode, tmp_path_factory):
    """One server for all tests of a mode that need no options; their files have unique() names."""
    with serve(mode, tmp_path_factory.mktemp(mode), patch=STAMPS["by its stamps"] % "server") as server:
        yield server


@pytest.fixture
def server(shared):
    """The shared server: whatever the test did to it, its log is clean and it answers the next client."""
    start = len(shared.log())
    yield shared
    shared.check_log(start)
    assert shared.alive()


@pytest.fixture
def peer(server):
    with server.peer() as peer:
        yield peer


# ==== Messages: one format in both scripts ==========================================================================


def message_functions(module):
    """Return {name: source} of the functions between the Messages banner and the next."""
    parts = re.split(r"^# ==== ", inspect.getsource(module), flags=re.M)
    messages, = [part for part in parts if part.startswith("Messages")]
    return {name: inspect.getsource(getattr(module, name)) for name in re.findall(r"^def (\w+)", messages, flags=re.M)}


def test_both_scripts_hold_the_same_message_format():
    ours, theirs = message_functions(ftp_server), message_functions(ftp_client)
    common = set(ours) & set(theirs)
    assert common
    for name in common:
        assert ours[name] == theirs[name], "%s differs" % name


@pytest.mark.parametrize("name", "split_name storable to_disk from_disk numbered numbered_start is_numbered lock wait_for is_loopback tune "
                         "unsent printable seconds port nanoseconds age fresh patiently".split())
def test_both_scripts_hold_the_same_helpers(name):
    assert inspect.getsource(getattr(ftp_server, name)) == inspect.getsource(getattr(ftp_client, name))


@cases("name, stored", {
    "characters": ('a<b>c:d"e|f?g*h', "a_b_c_d_e_f_g_h"), "dot": ("x.", "x_"), "space": ("x ", "x_"), "device": ("CON", "CON_"),
    "with an extension": ("nul.txt", "nul_.txt"), "port": ("Com1", "Com1_"), "superscript": ("LPT\u00b9.x", "LPT\u00b9_.x"),
    "console": ("ConOut$", "ConOut$_"),
    "like one": ("console.com10", "console.com10"), "Unicode": ("成绩.txt", "成绩.txt")})
@both_scripts
def test_what_windows_can_not_hold_is_an_underscore_there(module, name, stored):
    assert module.storable(name, windows=True) == stored
    assert module.storable(name, windows=False) == name


@cases("path, long", {"drive": (r"C:\up", r"\\?\C:\up"), "share": (r"\\pc\up\x", r"\\?\UNC\pc\up\x"),
                      "already": (r"\\?\C:\up", r"\\?\C:\up"), "elsewhere": ("/up", "/up")})
def test_path_may_be_long_on_windows(monkeypatch, path, long):
    monkeypatch.setattr(ftp_server, "os", types.SimpleNamespace(path=ntpath))
    assert ftp_server.long_path(path) == long


@both_scripts
def test_lock_on_windows_does_without_where_the_disk_has_none(module, monkeypatch):
    with tempfile.TemporaryFile() as file:
        monkeypatch.setattr(module, "fcntl", None)
        locking = mock.Mock(side_effect=[OSError(errno.EINVAL, "Invalid argument"), PermissionError(errno.EACCES, "another's")])
        monkeypatch.setattr(module, "msvcrt", mock.Mock(locking=locking), raising=False)
        module.lock(file.fileno())
        with pytest.raises(PermissionError):
            module.lock(file.fileno())
        assert file.tell() == 0


@both_scripts
def test_what_a_virus_scanner_holds_on_windows_is_renamed_a_moment_later(module, monkeypatch):
    denied, sleep = PermissionError(errno.EACCES, "denied"), mock.Mock()
    monkeypatch.setattr(module.time, "sleep", sleep)
    monkeypatch.setattr(module, "os", types.SimpleNamespace(name="posix"))
    with pytest.raises(PermissionError):
        module.patiently(mock.Mock(side_effect=denied), "a", "b")
    assert not sleep.called
    monkeypatch.setattr(module, "os", types.SimpleNamespace(name="nt"))
    rename = mock.Mock(side_effect=[denied, denied, None])
    module.patiently(rename, "a", "b", src_dir_fd=None)
    assert rename.call_args_list == [mock.call("a", "b", src_dir_fd=None)] * 3
    with pytest.raises(PermissionError):
        module.patiently(mock.Mock(side_effect=denied), "a", "b")
    with pytest.raises(FileExistsError):
        module.patiently(mock.Mock(side_effect=FileExistsError), "a", "b")
    assert sum(call[0][0] for call in sleep.call_args_list) < 1


@pytest.mark.parametrize("name", "UNSAFE WINDOWS_UNSAFE WINDOWS_DEVICE PARTIAL NAME_LIMIT PATH_LIMIT HEADER_LIMIT SIZE_LIMIT "
                         "NESTING_LIMIT DIGITS_LIMIT BRACKETS NO_BRACKETS STRING HEX UNSUPPORTED HEADER_TIME QUIET_TIME PORT VERSION "
                         "SETTLED FRESH".split())
def test_both_scripts_hold_the_same_constants(name):
    assert getattr(ftp_server, name) == getattr(ftp_client, name)


# ==== Session by hand: headers, byte by byte ========================================================================


def test_hello_tells_who_is_there(peer, mode):
    answer = peer.hello()
    assert re.match(r"\d", answer.pop("version"))
    assert answer == {"ok": True, "server": "ftp_server", "mode": mode, "protocol": 2, "max_size": None}


def test_unknown_keys_are_ignored(peer):
    assert peer.ask({"cmd": "hello", "color": {"deep": [1, 2.5, None, "x"]}, "": 0})["ok"]


def test_upload_may_come_a_byte_at_a_time(server, peer):
    name, data = unique(), content(100)
    peer.dribble(wire(put_header(name, data)) + data + wire({"sha256": sha(data)}))
    assert peer.line()["ok"]
    assert server.stored(name) == data


def test_header_may_be_65536_bytes_long_with_its_line_end(peer):
    header = b'{"cmd":"hello","x":"' + b"y" * (65536 - 23) + b'"}\n'
    assert len(header) == 65536
    assert peer.ask(header)["ok"]
    assert peer.hello()["ok"]


def test_pipelined_requests_are_answered_in_order(server, peer):
    name, missing, data = unique(), unique(), content(100000)
    server.serves(name, data)
    peer.send({"cmd": "hello"}, {"cmd": "get", "name": name}, {"cmd": "get", "name": missing}, {"cmd": "ls"},
              put_header(name, data), data, {"sha256": sha(data)}, {"cmd": "get", "name": name}, {"cmd": "hello"})
    assert peer.line()["protocol"] == 2
    assert peer.line()["size"] == len(data) and peer.read(len(data)) == data and peer.line()["sha256"] == sha(data)
    assert peer.line()["code"] == "not-found"
    assert name in peer.read(peer.line()["size"]).decode("utf-8")
    assert peer.line()["name"] == name
    assert peer.line()["size"] == len(data) and peer.read(len(data)) == data and peer.line()["sha256"] == sha(data)
    assert peer.line()["protocol"] == 2


def test_two_hundred_small_uploads_pipelined(server, peer):
    folder = unique("d")
    files = {"%s/%d" % (folder, number): content(50, number) for number in range(200)}
    for name, data in files.items():
        peer.send(put_header(name, data), data, {"sha256": sha(data)})
    assert [peer.line()["name"] for _ in files] == list(files)
    assert all(server.stored(name) == data for name, data in files.items())


@cases("header", {
    "cut short": b'{"cmd":"hello"\n',
    "trailing comma": b'{"cmd":"hello",}\n',
    "two objects": b'{"cmd":"hello"}{"cmd":"hello"}\n',
    "words after it": b'{"cmd":"hello"} hello\n',
    "single quotes": b"{'cmd':'hello'}\n",
    "bare word": b'{cmd:"hello"}\n',
    "comment": b'{"cmd":"hello"/* hi */}\n',
    "NaN": b'{"cmd":"hello","x":NaN}\n',
    "a key twice": b'{"cmd":"ls","cmd":"hello"}\n',
    "Infinity": b'{"cmd":"hello","x":Infinity}\n',
    "-Infinity": b'{"cmd":"hello","x":-Infinity}\n',
    "not UTF-8": b'{"cmd":"hello","x":"\xff"}\n',
    "surrogate in UTF-8": b'{"cmd":"hello","x":"\xed\xa0\x80"}\n',
    "UTF-16": '{"cmd":"hello"}'.encode("utf-16-le") + b"\n",
    "control character": b'{"cmd":"hel\x01lo"}\n',
    "NUL": b"{\0}\n",
    "deep lists": b'{"x":' + b"[" * 30000 + b"]" * 30000 + b"}\n",
    "deep lists unclosed": b'{"x":' + b"[" * 60000 + b"\n",
    "deep objects": b'{"x":' * 9000 + b"1" + b"}" * 9000 + b"\n",
    "65537 bytes": b'{"cmd":"hello","x":"' + b"y" * (65537 - 23) + b'"}\n',
    "70000 bytes without a line end": b'{"cmd":"hello","x":"' + b"y" * 70000,
})
def test_header_that_is_none_is_refused_and_the_connection_closed(peer, header):
    assert peer.ask(header)["code"] == "bad-request"
    assert peer.closed()


@cases("header", {
    "many lists": b'{"cmd":"hello","x":[' + b"[]," * 150 + b"[]]}\n",
    "brackets in a string": b'{"cmd":"hello","x":"' + b"[" * 500 + b'"}\n',
    "100 levels": b'{"cmd":"hello","x":' + b"[" * 99 + b"]" * 99 + b"}\n",
    "25 digits": b'{"cmd":"hello","x":' + b"9" * 25 + b"}\n",
    "many lists and objects": b'{"cmd":"hello","x":[' + b'[{}],{"":[]},' * 4000 + b"[]]}\n",
})
def test_key_that_nobody_knows_is_ignored_whatever_its_value(peer, header):
    assert peer.ask(header)["ok"]


@cases("header", {
    "with a BOM": b'\xef\xbb\xbf{"cmd":"hello"}\n',
    "list": b'[{"cmd":"hello"}]\n',
    "string": b'"hello"\n',
    "after a blank": b' {"cmd":"hello"}\n',
    "empty line": b"\n",
    "HTTP": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "Chinese": "你好".encode("utf-8"),
})
def test_first_byte_that_starts_no_request_is_refused_at_once(peer, header):
    start = time.monotonic()
    peer.send(header)
    assert not says_ok(peer.rest())
    assert time.monotonic() - start < ftp_server.HEADER_TIME / 2


HUGE = b"9" * 60000


@cases("number", {"true": b"true", "float": b"1.0", "exponent": b"1e3", "string": b'"1"', "negative": b"-1",
                  "list": b"[1]", "2**63": b"9223372036854775808", "huge": HUGE, "huge negative": b"-" + HUGE})
@cases("header, closes", {
    "put size": (b'{"cmd":"put","name":"bad-number","size":%s}\n', True),
    "put offset": (b'{"cmd":"put","name":"bad-number","size":1,"offset":%s}\n', True),
    "get offset": (b'{"cmd":"get","name":"bad-number","offset":%s}\n', False),
    "resume size": (b'{"cmd":"resume","name":"bad-number","size":%s,"id":"' + b"0" * 64 + b'"}\n', False),
})
def test_bad_number_is_refused(server, peer, header, closes, number):
    assert peer.ask(header.replace(b"%s", number))["code"] == "bad-request"
    assert not closes or peer.closed()  # who knows how long the payload is
    assert server.stored("bad-number") is None


@cases("header", {
    "no command": {},
    "command null": {"cmd": None},
    "command number": {"cmd": 7},
    "command list": {"cmd": ["put"]},
    "command object": {"cmd": {"put": 1}},
    "command unknown": {"cmd": "format"},
    "command in capitals": {"cmd": "HELLO"},
    "command dunder": {"cmd": "__class__"},
    "command method": {"cmd": "do_get"},
    "name missing": {"cmd": "get"},
    "name null": {"cmd": "get", "name": None},
    "name number": {"cmd": "get", "name": 5},
    "name list": {"cmd": "get", "name": ["a"]},
    "hash number": {"cmd": "get", "name": "x", "offset": 1, "sha256": 5},
    "verify string": {"cmd": "get", "name": "x", "verify": "no"},
    "path number": {"cmd": "ls", "path": 3},
    "path list": {"cmd": "ls", "path": [""]},
    "recursive string": {"cmd": "ls", "recursive": "yes"},
    "put without a name": {"cmd": "put", "size": 0},
    "put without a size": {"cmd": "put", "name": "x"},
    "id short": {"cmd": "put", "name": "x", "size": 0, "id": "0" * 63},
    "id long": {"cmd": "put", "name": "x", "size": 0, "id": "0" * 65},
    "id not hex": {"cmd": "put", "name": "x", "size": 0, "id": "g" * 64},
    "id a path": {"cmd": "put", "name": "x", "size": 0, "id": "../" * 21 + "x"},
    "id number": {"cmd": "put", "name": "x", "size": 0, "id": 7},
    "id in other digits": {"cmd": "put", "name": "x", "size": 0, "id": "٣" * 64},
    "id with a line end": {"cmd": "put", "name": "x", "size": 0, "id": "0" * 63 + "\n"},
    "mtime string": {"cmd": "put", "name": "x", "size": 0, "mtime": "now"},
    "mtime true": {"cmd": "put", "name": "x", "size": 0, "mtime": True},
    "mtime list": {"cmd": "put", "name": "x", "size": 0, "mtime": [1]},
    "resume without a size": {"cmd": "resume", "name": "x", "id": "0" * 64},
    "resume without an id": {"cmd": "resume", "name": "x", "size": 1},
    "resume with a bad id": {"cmd": "resume", "name": "x", "size": 1, "id": "zz"},
})
def test_bad_value_is_refused(peer, header):
    assert peer.ask(header)["code"] in ("bad-request", "bad-name", "mismatch")


@cases("mtime", {"huge": b"1e300", "negative": b"-5", "past float": b"1e999", "huge integer": b"9" * 5000,
                 "beyond the year 9999": b"999999999999999", "largest": b"9223372036854775807"})
def test_odd_time_stores_or_refuses_and_never_breaks(server, peer, mtime):
    name = unique()
    header = b'{"cmd":"put","name":"' + name.encode() + b'","size":2,"mtime":' + mtime + b"}\n"
    answer = peer.ask(header, b"hi", {"sha256": sha(b"hi")})
    assert answer["ok"] or answer["code"] == "bad-request"
    assert server.stored(name) == (b"hi" if answer["ok"] else None)


# ==== Transfers =====================================================================================================


@pytest.mark.parametrize("size", SIZES)
def test_put_stores_every_byte(server, peer, size):
    name, data = unique(), content(size)
    assert peer.put(name, data) == {"ok": True, "name": name, "size": size, "sha256": sha(data), "duplicate": False}
    assert server.stored(name) == data


@pytest.mark.parametrize("size", SIZES)
def test_get_brings_every_byte(server, peer, size):
    name, data = unique(), content(size)
    path = server.serves(name, data)
    answer, payload, last = peer.get(name)
    assert (answer["ok"], answer["size"], answer["offset"]) == (True, size, 0)
    assert answer["mtime"] == modified(path)
    assert payload == data
    assert last == {"ok": True, "sha256": sha(data)}


@cases("offset, expected", {"start": (1, 1), "middle": (500, 500), "end": (1000, 1000), "past the end": (1001, 0)})
def test_get_goes_on_where_the_hash_matches(server, peer, offset, expected):
    name, data = unique(), content(1000)
    server.serves(name, data)
    answer, payload, last = peer.get(name, offset=offset, sha256=sha(data[:offset]))
    assert (answer["offset"], payload, last["sha256"]) == (expected, data[expected:], sha(data))
    for header in ({"sha256": sha(b"another")}, {}):
        answer, payload, last = peer.get(name, offset=offset, **header)
        assert (answer["offset"], payload, last["sha256"]) == (0, data, sha(data))


def test_without_verifying_no_hash_is_sent(server, peer):
    name, data = unique(), content(1000)
    server.serves(name, data)
    assert peer.get(name, verify=False)[1:] == (data, {"ok": True, "sha256": None})
    answer = peer.ask(put_header(name, data, verify=False), data, {"sha256": None})
    assert answer == {"ok": True, "name": name, "size": 1000, "sha256": None, "duplicate": False}
    assert server.stored(name) == data


@posix
@in_all_modes_at_once
def test_hash_that_is_remembered_is_that_of_the_file_as_it_is(mode, folder):
    old, new = content(3 * MIB, 1), content(3 * MIB, 2)
    with serve(mode, folder, patch="import ftp_server; ftp_server.SETTLED = ftp_server.FRESH = -1") as server, server.peer() as peer:
        path = server.serves("x", old)
        for data in (old, old, new, new):
            stamp = os.stat(path).st_mtime_ns
            if read_bytes(path) != data:
                server.serves("x", data)
                os.utime(path, ns=(stamp, stamp))  # the same size and time
            assert peer.get("x")[1:] == (data, {"ok": True, "sha256": sha(data)})
            assert peer.get("x", offset=len(data), sha256=sha(data))[0]["offset"] == len(data)
            assert peer.get("x", offset=len(data), sha256=sha(b""))[0]["offset"] == 0


@posix
def test_hash_of_a_file_that_was_written_just_now_is_not_kept_though_it_is_dated_ahead(tmp_path):
    path = fill(tmp_path, {"x": b"new"})
    storage = ftp_server.Storage(str(tmp_path), str(tmp_path))
    for mtime in (1, 99999999999):
        os.utime(path, (1, mtime))
        with storage.open_download("x") as download:
            assert not download.settled
            storage.remember_digest(download, sha(b"new"))
            assert not storage.digests
            download.settled = True
            storage.remember_digest(download, sha(b"new"))
            assert storage.digests.popitem()[1] == sha(b"new")


def test_hash_is_not_remembered_of_a_file_whose_stamps_tell_nothing(tmp_path, monkeypatch):
    storage = ftp_server.Storage(fill(tmp_path, {"d/x": b"new"}) and str(tmp_path), str(tmp_path))
    for limit, known in ((0, "hash"), (60, None)):
        monkeypatch.setattr(ftp_server, "FRESH", limit)
        with storage.open_download("d/x") as download:
            storage.digests[download.identity()] = "hash"
        with storage.open_download("d/x") as download:
            assert download.known == known


@posix
@cases("seconds, written, changed, is_fresh", {
    "just now": (0, 5, 5, True), "fine clock": (1, 5, 5, False), "clock of whole seconds": (1, 0, 0, True),
    "whole seconds of writing only": (1, 0, 5, True), "whole seconds, long ago": (3, 0, 0, False), "ahead": (-60, 5, 5, False)})
@both_scripts
def test_file_is_fresh_as_long_as_the_next_write_may_get_the_same_stamps(module, monkeypatch, seconds, written, changed, is_fresh):
    monkeypatch.setattr(module.time, "time", lambda: 1000.0 + seconds + 5e-9)
    info = types.SimpleNamespace(st_mtime=1000 + written / 1e9, st_mtime_ns=1000 * 10 ** 9 + written,
                                 st_ctime=1000 + changed / 1e9, st_ctime_ns=1000 * 10 ** 9 + changed)
    assert module.fresh(info) is is_fresh
    monkeypatch.setattr(module, "os", types.SimpleNamespace(name="nt"))  # where nobody can tell
    assert module.fresh(info)


@linux
def test_put_onto_another_disk_is_refused_before_its_payload(tmp_path, monkeypatch):
    def fstat(fd, fstat=os.fstat):
        info = list(fstat(fd))
        info[stat.ST_DEV] += os.readlink("/proc/self/fd/%d" % fd).endswith("/disk")
        return os.stat_result(info)

    storage = ftp_server.Storage(str(tmp_path), str(tmp_path))
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(os, "fstat", fstat)
    with ftp_server.Upload(storage, ["x"], 1, None), pytest.raises(ftp_server.Refusal, match="another disk"):
        ftp_server.Upload(storage, ["disk", "x"], 1, None)
    assert tree(tmp_path, hidden=True) == {".partial": None, "disk": None}


@cases("last, codes", {
    "no hash": (b'{"sha256":null}\n', None), "nothing": (b"{}\n", None),
    "another hash": ({"sha256": sha(b"another")}, ["mismatch"]),
    "short hash": (b'{"sha256":"abc"}\n', ["bad-request", "mismatch"]), "number": (b'{"sha256":5}\n', ["bad-request"]),
    "not JSON": (b"and that was it\n", ["bad-request"]), "list": (b"[]\n", ["bad-request"]),
    "more payload": (b"\0" * 99 + b"\n", ["bad-request"]),
})
def test_last_line_of_a_put_decides(server, peer, last, codes):
    name, data = unique(), content(1000)
    answer = peer.ask(put_header(name, data), data, last)
    assert answer["ok"] if codes is None else answer["code"] in codes
    assert server.stored(name) == (None if codes else data)


@pytest.mark.parametrize("mtime", [0, 1000000000, 1234567890.25, 1234567890.3257394, 1700000000.909925,
                                   pytest.param(-4.091402441, marks=posix)])
def test_put_keeps_the_modification_time(server, peer, mtime):
    name = unique()
    assert peer.put(name, b"x", mtime=mtime)["ok"]
    assert modified(os.path.join(server.upload, name)) == mtime


def test_listing_names_files_and_folders(server, peer):
    folder = unique("d")
    path = fill(os.path.join(server.download, folder), {"sub/deep/3.txt": b"", "empty": None, "one two.txt": b"12345"})
    flat = peer.ls(folder)
    types = {name: entry["type"] for name, entry in flat.items()}
    assert types == {"one two.txt": "file", "sub": "dir", "empty": "dir"}
    assert flat["one two.txt"]["size"] == 5
    assert flat["one two.txt"]["mtime"] == modified(path)
    assert folder in peer.ls() and folder + "/sub" not in peer.ls()
    assert set(peer.ls(folder, recursive=True)) == {"one two.txt", "sub", "sub/deep", "sub/deep/3.txt", "empty"}
    assert set(peer.ls(folder + "/sub", recursive=True)) == {"deep", "deep/3.txt"}


def test_long_listing_lets_others_go_first_and_a_short_one_waits_for_nobody(tmp_path):
    fill(tmp_path, dict({"short/%d" % number: b"" for number in range(15)}, **{"%d" % number: b"" for number in range(500)}))
    assert list(ftp_server.Listing(str(tmp_path), "short", True).collect()) == []
    assert list(ftp_server.Listing(str(tmp_path), "", True).collect()) == [ftp_server.LISTS] * 25


@posix
def test_full_folder_lets_others_go_first_before_its_names_are_read(tmp_path, monkeypatch):
    storage = ftp_server.Storage(str(tmp_path), str(tmp_path))
    fill(tmp_path, {"x": b"1", "x-2": b"12", "x-4": b"1234"})
    put = storage.open_upload("x", 3, None, None)
    with pytest.raises(StopIteration) as end:
        next(put)
    with end.value.value as upload:
        upload.write(b"123")
        assert list(upload.publish()) == [ftp_server.COMPUTES] * 3 and read_bytes(tmp_path / "x-3") == b"123"
    monkeypatch.setattr(ftp_server, "BIG_FOLDER", os.stat(str(tmp_path)).st_size - 1)
    with mock.patch.object(ftp_server.os, "listdir") as listdir:
        assert next(ftp_server.Listing(str(tmp_path), "", False).collect()) == ftp_server.LISTS and not listdir.called


def test_what_is_left_out_of_a_listing_has_room_in_a_header(tmp_path):
    listing = ftp_server.Listing(str(tmp_path), "", True)
    for number in range(1000):
        listing.leave_out(["\U0001f393" * 60] * 20 + [str(number)], OSError(errno.EACCES, "no"))
    assert listing.told().endswith(" and 980 more")
    assert len(ftp_server.encode({"ok": True, "left_out": listing.told()})) < ftp_server.HEADER_LIMIT - 1000


@linux
@in_all_modes_at_once
def test_get_goes_on_by_reading_where_sendfile_does_not(mode, folder):
    faults, data = Faults(folder), content(3 * MIB)
    patch = STAMPS["by its stamps"] % "server" + """
import os
def send_some(to, fd, offset, count, send=os.sendfile):
    return send(to, fd, offset, min(count, 1 << 20))
os.sendfile = send_some
"""
    with serve(mode, folder, patch=patch, faults=faults) as server, server.peer() as peer:
        server.serves("x", data)
        for call in (1, 2):  # of a megabyte at most: the second is made however quickly all is read
            faults.arm("raise", ["sendfile"], at=call, last=99, error=errno.EINVAL)
            assert peer.get("x", verify=False)[1] == data and faults.struck()
        assert peer.hello()["ok"]


@linux
@in_all_modes_at_once
def test_put_without_a_hash_does_without_a_pipe(mode, folder):
    patch, data = "import os\ndef pipe(): raise OSError(24, 'Too many open files')\nos.pipe = pipe", content(3 * MIB)
    with serve(mode, folder, patch=patch) as server, server.peer() as peer:
        assert peer.put("x", data, verify=False)["ok"] and server.stored("x") == data


def test_file_with_a_name_that_windows_can_not_ask_for_is_told_as_left_out(tmp_path, monkeypatch):
    fill(tmp_path, {"aux_": b"1", "x": b"2"})
    monkeypatch.setattr(ftp_server, "storable", lambda part: part.replace("_", "__"))
    listing = ftp_server.Listing(str(tmp_path), "", True)
    list(listing.collect())
    assert b"aux" not in listing.lines and b'"x"' in listing.lines
    assert listing.told() == "aux_ (no name that can be asked for)"


@posix
@pytest.mark.parametrize("count", [2, 25])
def test_what_get_r_must_leave_out_is_told_on_both_sides(server, work, count):
    top = unique()
    fill(server.download, dict({"%s/sub/\r%d" % (top, number): b"" for number in range(count)}, **{top + "/sub/x": b"x"}))
    start = len(server.log())
    done = client(server, "get", "-r", top, cwd=work)
    told = re.sub(r"\S+ \(no name that can be asked for\)(, )?", "", done.err)
    assert done.code == 1 and told == "left out of the listing: " + (" and 5 more" if count > 20 else "") + "\n"
    assert "%s/sub/\\r1 (no" % top in done.err and "%s leaves out: %s/sub/\\r0 (no" % (top, top) in server.log()[start:]
    assert tree(work / top) == {"sub": None, "sub/x": b"x"}
    assert client(server, "ls", top + "/sub", cwd=work).code == 0


@posix
@cases("error, whole", {"gone": (errno.ENOENT, True), "not for us": (errno.EACCES, True), "a link now": (errno.ENOTDIR, True),
                        "no descriptors": (errno.EMFILE, False), "read error": (errno.EIO, False)})
@pytest.mark.parametrize("operation", ["inner", "stat"])
def test_listing_lacks_nothing_but_what_is_gone_or_not_for_us(tmp_path, monkeypatch, operation, error, whole):
    fill(tmp_path, {"a": b"", "sub/b": b"", "sub/deep/c": b"", "z": b""})
    real = getattr(ftp_server.Folder, operation)

    def failing(folder, part, *args):
        if part in ("deep", "b"):
            raise OSError(error, os.strerror(error))
        return real(folder, part, *args)

    monkeypatch.setattr(ftp_server.Folder, operation, failing)
    listing = ftp_server.Listing(str(tmp_path), "", True)
    if whole:
        assert list(listing.collect()) == []
        names = [json.loads(line)["name"] for line in listing.lines.decode("ascii").splitlines()]
        assert names == ["a", "sub", "z"] + (["sub/b", "sub/deep"] if operation == "inner" else [])
        missing = [] if error == errno.ENOENT else ["sub/deep"] if operation == "inner" else ["sub/b", "sub/deep"]
        assert listing.left_out == dict.fromkeys(missing, os.strerror(error))
    else:
        with pytest.raises(OSError):
            list(listing.collect())


@in_all_modes_at_once
def test_listing_needs_no_turn_among_those_that_compute(mode, folder):
    """As many as may compute stand still and count for ever; a long listing has its turn all the same."""
    faults, many = Faults(folder), ftp_server.AT_ONCE[ftp_server.COMPUTES]
    with serve(mode, folder, faults=faults, patch="import ftp_server; ftp_server.STUCK = 1e6") as server, contextlib.ExitStack() as stack:
        server.serves("x", content(600000))
        fill(server.download, {"long/%d" % number: b"" for number in range(3 * ftp_server.LISTED)})
        faults.arm("hold", ["read"], last=many)
        for _ in range(many):
            stack.enter_context(server.peer()).send({"cmd": "get", "name": "x"})
        wait_for(lambda: faults.struck(many))
        with server.peer() as peer:
            assert len(peer.ls("long")) == 3 * ftp_server.LISTED
        with server.peer() as peer:
            assert peer.ask({"cmd": "ls", "path": "long", "long": "header" * 1000})["ok"]
        faults.disarm()


@posix
def test_name_that_no_header_can_hold_does_not_break_the_listing(server, peer):
    folder = unique("d")
    server.serves(folder + "/good", b"")
    for name in (b"bad\xff", b"line\nend", b"back\\slash", b"escape\x1b[31m"):
        with open(os.path.join(os.fsencode(server.download), folder.encode(), name), "wb"):
            pass
    assert set(peer.ls(folder)) == {"good"}


def test_uploads_are_not_served(peer):
    name = unique()
    assert peer.put(name, b"x")["ok"]
    assert peer.get(name)[0]["code"] == "not-found"


@in_all_modes_at_once
def test_partials_are_neither_listed_nor_served_where_both_folders_are_one(mode, folder):
    both = str(folder / "both")
    os.mkdir(both)
    data = content(5000)
    with serve(mode, folder, "--upload", both, "--download", both) as server:
        server.upload = both
        with server.peer() as peer, server.begin_upload("half", data, 3000, id=upload_id()):
            assert peer.put("whole", data)["ok"]
            assert set(peer.ls(recursive=True)) == {"whole"}
            answer = peer.ask({"cmd": "ls", "path": "", "recursive": True})
            assert "left_out" not in answer and peer.read(answer["size"])
            hidden = list(server.partials())[0]
            assert peer.get("whole")[1] == data
            assert peer.get(".partial/" + hidden)[0]["code"] == "bad-name"
            assert peer.ask({"cmd": "ls", "path": ".partial"})["code"] == "bad-name"


GOOD_NAMES = {
    "space": "two words.txt", "leading space": " x.txt", "quote": "it's.txt", "percent": "100%s%n%d.txt",
    "Chinese": "成绩单.txt", "emoji": "🎓.txt", "combining": "e\u0301.txt", "Arabic": "ملف.txt", "dash": "-rf",
    "tilde": "~root", "dollar": "$HOME", "three dots": "...x", "hidden": ".hidden", "no extension": "Makefile",
    "brackets": "[a]{b}", "255 bytes": "é" * 127 + "x", "folders": "a/b b/ç.txt", "braces": "{}", "soft hyphen": "a\u00adb",
}
if os.name == "posix":
    GOOD_NAMES.update({"bar": "a|b|c", "colon": "c:x", "star": "*?.txt", "double quotes": '"x"', "device": "CON",
                       "dot at the end": "x.", "space at the end": "x "})


@cases("name", GOOD_NAMES)
def test_any_good_name_travels_both_ways(server, peer, name):
    folder, data = unique("d"), name.encode("utf-8")
    name = folder + "/" + name
    assert peer.put(name, data)["name"] == name
    assert server.stored(name) == data
    server.serves(name, data)
    assert peer.get(name)[1] == data
    assert name[len(folder) + 1:] in peer.ls(folder, recursive=True)


# ==== Refusals ======================================================================================================


@cases("name", {
    "empty": "", "absolute": "/etc/passwd", "parent": "..", "above": "../x", "down and up": "a/../b", "up": "a/..",
    "double slash": "a//b", "slash at the end": "a/", "slash": "/", "backslash": "a\\b", "Windows above": "..\\x",
    "NUL": "a\0b", "line end": "a\nb", "escape": "a\x1b[31mb", "DEL": "a\x7fb", "C1": "a\x9bb", "NEL": "a\x85b",
    "lone surrogate": "a\ud800b", "256 bytes": "x" * 256, "258 bytes": "大" * 86, "partial folder": ".partial",
    "in the partial folder": ".partial/x", "in capitals": ".PARTIAL/x",
})
def test_bad_name_is_refused(server, peer, name):
    before = os.listdir(server.upload)
    assert peer.put(name, b"payload")["code"] == "bad-name"
    assert peer.ask({"cmd": "get", "name": name})["code"] == "bad-name"
    assert peer.ask({"cmd": "resume", "name": name, "size": 7, "id": upload_id()})["code"] == "bad-name"
    assert not name or peer.ask({"cmd": "ls", "path": name})["code"] == "bad-name"
    assert peer.hello()["ok"]
    assert os.listdir(server.upload) == before


@pytest.mark.parametrize("name", [".", "a/.", "./a"])
def test_dot_in_a_name_leads_nowhere_else(server, peer, name):
    assert peer.put(name, b"payload")["code"] == "bad-name"
    assert peer.ask({"cmd": "get", "name": name})["code"] == "bad-name"


def test_missing_file_is_not_found(peer):
    assert peer.get(unique())[0]["code"] == "not-found"
    assert peer.get(unique() + "/" + unique())[0]["code"] == "not-found"
    assert peer.ask({"cmd": "ls", "path": unique()})["code"] == "not-found"


def test_folder_is_not_a_file_nor_a_file_a_folder(server, peer):
    folder, name = unique("d"), unique()
    server.serves(folder + "/x", b"")
    assert peer.get(folder)[0]["code"] == "not-a-file"
    assert peer.ask({"cmd": "ls", "path": folder + "/x"})["code"] == "not-a-file"
    assert peer.put(name, b"file")["ok"] and peer.put(folder + "/x", b"first")["ok"]
    assert peer.put(name + "/x", b"payload")["code"] == "denied"
    answer = peer.put(folder, b"second")
    assert answer["ok"] is False or server.stored(answer["name"]) == b"second"
    assert server.stored(name) == b"file" and server.stored(folder + "/x") == b"first"


@posix
@pytest.mark.parametrize("special", ["fifo", "socket"])
def test_special_file_is_not_a_file_and_never_hangs(server, peer, special):
    name = unique()
    for path in (os.path.join(server.download, name), os.path.join(server.upload, name)):
        if special == "fifo":
            os.mkfifo(path)
        else:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.bind(os.path.relpath(path))  # a socket's path must be short
    start = time.monotonic()
    assert peer.get(name)[0]["code"] == "not-a-file"
    answer = peer.put(name, b"payload")
    assert answer["ok"] is False or answer["name"] != name
    assert name not in peer.ls()
    assert time.monotonic() - start < 5
    os.unlink(path)


@linux
@in_all_modes_at_once
def test_file_without_permission_is_denied(mode, folder):
    with serve(mode, folder, patch=DROP_PRIVILEGES) as server, server.peer() as peer:
        os.chmod(server.serves("secret", b"secret"), 0)
        os.chmod(server.upload, 0o555)
        assert peer.get("secret")[0]["code"] == "denied"
        assert peer.put("new/x", b"payload")["code"] == "denied"
        os.chmod(server.upload, 0o755)
        assert peer.put("new/x", b"payload")["ok"]
        os.chmod(os.path.join(server.upload, "new", "x"), 0)
        assert peer.put("new/x", b"another")["name"] == "new/x-2"  # the same size: only a look could tell


@linux
@in_all_modes_at_once
def test_folder_that_can_not_be_read_spoils_no_listing(mode, folder):
    with serve(mode, folder, patch=DROP_PRIVILEGES) as server, server.peer() as peer:
        for name, permissions in (("a", None), ("closed", 0), ("names only", 0o444), ("z", None)):
            path = server.serves(name + "/x", b"x")
            if permissions is not None:
                os.chmod(os.path.dirname(path), permissions)
        assert set(peer.ls(recursive=True)) == {"a", "a/x", "closed", "names only", "z", "z/x"}
        for name in ("closed", "names only"):
            assert peer.ask({"cmd": "ls", "path": name})["code"] == "denied"
            os.chmod(os.path.join(server.download, name), 0o755)


def test_refused_payload_is_read_past_and_the_connection_kept(peer):
    data = content(MIB - 100)
    peer.send(put_header("../x", data), data, {"sha256": sha(data)}, {"cmd": "hello"})
    assert peer.line()["code"] == "bad-name"
    assert peer.line()["protocol"] == 2


@cases("offset", {"past the size": {"offset": 6, "id": "0" * 64}, "without an id": {"offset": 5}})
def test_bad_offset_is_answered_and_the_connection_closed(peer, offset):
    assert peer.ask(dict({"cmd": "put", "name": "x", "size": 5}, **offset))["code"] == "bad-request"
    assert peer.closed()


@pytest.mark.parametrize("sent", [0, 2 * MIB], ids=["before the payload", "after much of it"])
def test_refused_long_payload_is_answered_and_the_connection_closed(peer, sent):
    data = content(4 * MIB)
    with contextlib.suppress(ConnectionError):
        peer.send(put_header("../x", data), data[:sent])
    assert peer.line()["code"] == "bad-name"
    assert sent == 0 or peer.file.read(1) == b""  # the end of the stream, and no reset


def test_what_begins_neither_a_message_nor_a_classic_request_is_refused_at_its_first_byte(peer):
    peer.hello()
    peer.send("x")  # and no line end
    assert peer.line()["code"] == "bad-request" and peer.closed()


def test_connection_that_the_server_closes_is_read_past_for_a_while(peer):
    assert peer.ask(b"{nonsense}\n")["code"] == "bad-request"
    assert peer.file.read(1) == b""
    for _ in range(5):
        peer.send(b"x" * 1000)  # at a closed socket the second one would raise
        time.sleep(0.02)


@in_all_modes_at_once
def test_connection_that_the_server_closes_lingers_without_a_false_word_in_the_log(mode, folder):
    patch = "import ftp_server; ftp_server.LINGER_TIME = 0.3"
    with serve(mode, folder, patch=patch) as server, server.peer() as peer:
        assert peer.ask(b"{nonsense}\n")["code"] == "bad-request"
        assert peer.closed()  # one way: the other stays open for as long as it lingers
        with contextlib.suppress(ConnectionError):
            wait_for(lambda: peer.sock.send(b"x") and time.sleep(0.05))
    assert "left" not in server.log()


SMALL_BUFFER = "import ftp_server; ftp_server.LOOPBACK_BUFFER = 16384"


@in_all_modes_at_once
def test_last_answer_has_the_whole_time_of_lingering(mode, folder):
    with serve(mode, folder, "--timeout", "4", patch=SMALL_BUFFER) as server, server.slow_peer() as peer:
        data = content(200000)
        server.serves("x", data)
        peer.send({"cmd": "get", "name": "x"}, b"{nonsense}\n")
        time.sleep(0.8)  # longer than the server waits before its first look at whether something was taken
        assert peer.line()["size"] == len(data) and peer.read(len(data)) == data and peer.line()["ok"]
        assert peer.line()["code"] == "bad-request"


@in_all_modes_at_once
def test_classic_request_that_is_ahead_of_its_time_costs_no_byte_of_the_answer_before(mode, folder):
    with serve(mode, folder, patch=SMALL_BUFFER) as server, server.slow_peer() as peer:
        data = content(200000)
        server.serves("x", data)
        peer.send("get|x|0")
        assert peer.read(10) == b"YES|200000"
        peer.send("second_active" + "get|x|0")
        time.sleep(0.2)  # longer than the pause that ends a request
        peer.sock.shutdown(socket.SHUT_WR)
        assert peer.rest() == data + b"YES|200000"


@in_all_modes_at_once
def test_max_size_is_told_and_holds(mode, folder):
    with serve(mode, folder, "--max-size", "64K") as server, server.peer() as peer:
        assert peer.hello()["max_size"] == 65536
        assert peer.put("fits", content(65536))["ok"]
        assert peer.put("too-large", content(65537))["code"] == "too-large"
        assert peer.ask({"cmd": "resume", "name": "x", "size": 65537, "id": upload_id()})["code"] == "too-large"
        assert peer.ask({"cmd": "resume", "name": "x", "size": 65536, "id": upload_id()})["ok"]
        with server.peer() as classic:
            classic.send("put|classic|65537")
            assert classic.rest_or_no() in (b"", b"NO|0")
        assert set(server.uploads()) == {"fits"}


# ==== Files: kept both, resumed, whole ==============================================================================


def test_other_content_is_kept_beside_it_and_the_same_is_stored_once(server, peer):
    folder = unique("d")
    for data, name, duplicate in ((b"one", "x.txt", False), (b"one", "x.txt", True), (b"two", "x-2.txt", False),
                                  (b"six", "x-3.txt", False), (b"two", "x-2.txt", True), (b"one", "x.txt", True)):
        answer = peer.put(folder + "/x.txt", data)
        assert (answer["name"], answer["duplicate"], answer["sha256"]) == (folder + "/" + name, duplicate, sha(data))
    assert tree(os.path.join(server.upload, folder)) == {"x.txt": b"one", "x-2.txt": b"two", "x-3.txt": b"six"}
    os.unlink(os.path.join(server.upload, folder, "x-2.txt"))
    assert peer.put(folder + "/x.txt", b"six")["name"] == folder + "/x-3.txt"  # found behind the gap


def test_other_content_is_told_apart_without_verifying_too(server, peer):
    name, data = unique(), content(70000)
    assert peer.put(name, data)["ok"]
    for again, duplicate in ((data, True), (b"!" + data[1:], False), (data[:-1] + b"!", False)):
        answer = peer.ask(put_header(name, again, verify=False), again, {"sha256": None})
        assert (answer["name"] == name, answer["duplicate"]) == (duplicate, duplicate)
        assert server.stored(answer["name"]) == again


@pytest.mark.parametrize("name", ["a.txt", "a", "a-2", ".a", "a.tar.gz", "a-5." + "x" * 150, "é" * 125 + ".txt", "x" * 255,
                                  "a" * 241 + "-9999999zz.txt", "文" * 85])
def test_numbered_names_begin_as_they_are_looked_for(name):
    for number in (2, 3, 10, 99, 1000, 10 ** 6, 10 ** 8, 10 ** 9 - 1):
        found = ftp_server.numbered(name, number)
        assert found.startswith(ftp_server.numbered_start(name)) and ftp_server.is_numbered(found, name)
    assert not ftp_server.is_numbered(name, name)


def test_number_that_a_user_gave_is_none_of_ours(server, peer):
    folder = unique("d")
    for name, data, stored in (("a-1.txt", b"one", "a-1.txt"), ("a.txt", b"two", "a.txt"), ("a.txt", b"one", "a-2.txt")):
        assert peer.put(folder + "/" + name, data)["name"] == folder + "/" + stored


@posix
def test_empty_file_is_not_what_a_fifo_of_its_name_is(server, peer):
    name = unique()
    os.mkfifo(os.path.join(server.upload, name))
    answer = peer.put(name, b"")
    assert (answer["name"], answer["duplicate"]) == (ftp_server.numbered(name, 2), False)


def test_hash_may_be_in_capitals(server, peer):
    name, data = unique(), content(1000)
    assert peer.ask(put_header(name, data), data, {"sha256": sha(data).upper()})["ok"]
    server.serves(name, data)
    assert peer.get(name, offset=600, sha256=sha(data[:600]).upper())[0]["offset"] == 600


def test_name_without_an_extension_and_the_longest_name_can_be_numbered(server, peer):
    folder = unique("d")
    assert peer.put(folder + "/Makefile", b"one")["name"] == folder + "/Makefile"
    assert peer.put(folder + "/Makefile", b"two")["name"] == folder + "/Makefile-2"
    name = folder + "/" + "é" * 125 + ".txt"
    assert peer.put(name, b"one")["name"] == name
    stored = peer.put(name, b"two")["name"]
    assert stored != name and stored.endswith("-2.txt") and len(stored[len(folder) + 1:].encode("utf-8")) <= 255
    assert server.stored(stored) == b"two"
    third = peer.put(name, b"three")["name"]
    os.unlink(os.path.join(server.upload, *stored.split("/")))
    again = peer.put(name, b"three")  # found behind the gap, so it is not stored twice
    assert again["duplicate"] and again["name"] == third
    name = folder + "/a-5." + "x" * 150  # the number stands behind such an extension
    assert [peer.put(name, data)["name"] for data in (b"one", b"two", b"three")] == [name, name + "-2", name + "-3"]
    os.unlink(os.path.join(server.upload, *(name + "-2").split("/")))
    assert peer.put(name, b"three")["name"] == name + "-3"
    name = folder + "/a." + "e" * 253  # an extension that leaves no room for a number
    assert peer.put(name, b"one")["name"] == name
    stored = peer.put(name, b"two")["name"]
    assert len(stored) == len(name) and server.stored(stored) == b"two"


@in_all_modes_at_once
def test_overwriting_put_of_a_folders_name_is_refused_before_its_bytes(mode, folder):
    with serve(mode, folder, "--overwrite") as server, server.peer() as peer:
        fill(server.upload, {"d": None})
        assert peer.ask(put_header("d", content(1000)))["code"] == "not-a-file"


@posix
@in_all_modes_at_once
def test_overwrite_replaces_atomically(mode, folder):
    with serve(mode, folder, "--overwrite") as server, server.peer() as peer:
        old, new = content(300000, 1), content(300000, 2)
        assert peer.put("x", old)["ok"]
        done, seen = threading.Event(), set()

        def watch():
            while not done.is_set():
                seen.add(sha(server.stored("x")))

        def replace():
            try:
                for data in [new, old] * 10:
                    assert peer.put("x", data)["name"] == "x"
            finally:
                done.set()

        at_once(watch, replace)
        assert seen <= {sha(old), sha(new)}
        assert set(server.uploads()) == {"x"}


@posix
@in_all_modes_at_once
def test_what_is_overwritten_at_once_by_many_is_whole_and_never_gone(mode, folder):
    contents = [content(2000, seed) for seed in range(4)]
    with serve(mode, folder, "--overwrite") as server, contextlib.ExitStack() as stack:
        peers = [stack.enter_context(server.peer()) for _ in contents]

        def put(peer, data):
            return all(peer.put("x", data)["ok"] and server.stored("x") in contents for _ in range(100))

        assert all(at_once(*[functools.partial(put, *pair) for pair in zip(peers, contents)]))
        assert set(server.uploads()) == {"x"}


def test_cut_upload_leaves_nothing_visible(server):
    name, data, before = unique(), content(100000), set(server.partials())
    for count, last in ((0, b""), (1, b""), (99999, b""), (100000, b""), (100000, b'{"sha256":')):
        with server.peer() as peer:
            peer.send(put_header(name, data), data[:count], last)
            peer.sock.shutdown(socket.SHUT_WR)
            assert not says_ok(peer.rest())
        assert server.stored(name) is None
    wait_for(lambda: set(server.partials()) <= before)  # without an id nobody can resume


def test_upload_in_progress_is_not_visible(server):
    name, data = unique(), content(100000)
    with server.begin_upload(name, data, len(data), id=upload_id()) as peer:
        assert server.stored(name) is None
        assert peer.ask({"sha256": sha(data)})["ok"]
        assert server.stored(name) == data


def test_cut_upload_is_resumed_where_it_broke(server, peer):
    name, data, identity, before = unique(), content(300000), upload_id(), set(server.partials())
    ask = {"cmd": "resume", "name": name, "size": len(data), "id": identity}
    assert peer.ask(dict(ask, id=upload_id())) == {"ok": True, "offset": 0, "sha256": sha(b"")}
    server.cut_upload(name, data, 123456, id=identity)
    assert peer.ask(ask) == {"ok": True, "offset": 123456, "sha256": sha(data[:123456])}
    answer = peer.put(name, data, offset=123456, id=identity)
    assert answer == {"ok": True, "name": name, "size": len(data), "sha256": sha(data), "duplicate": False}
    assert server.stored(name) == data
    assert set(server.partials()) <= before


@cases("header, seed, code", {
    "past the partial": ({"offset": 501}, 1, "mismatch"), "another version": ({"offset": 500}, 2, "mismatch"),
    "past, not verified": ({"offset": 501, "verify": False}, 1, "mismatch"),
    "below cuts it back": ({"offset": 499}, 1, None), "from the start": ({"offset": 0}, 2, None)})
def test_offset_of_a_resumed_upload(server, peer, header, seed, code):
    name, identity, new = unique(), upload_id(), content(1000, seed)
    server.cut_upload(name, content(1000, 1), 500, id=identity)
    answer = peer.put(name, new, id=identity, **header)
    assert answer.get("code") == code
    assert server.stored(name) == (None if code else new)


@pytest.mark.parametrize("other", [{"name": "other"}, {"size": 400}, {"id": "1" * 64}], ids=["name", "size", "id"])
def test_put_of_another_file_than_the_resume_before_it(server, peer, other):
    folder, identity, data = unique("d"), upload_id(), content(500)
    server.cut_upload(folder + "/x", data, 300, id=identity)
    ask = {"cmd": "resume", "name": folder + "/x", "size": 500, "id": identity}
    assert peer.ask(ask)["offset"] == 300
    header = {"name": folder + "/" + other.get("name", "x"), "size": other.get("size", 500), "id": other.get("id", identity)}
    mine = data[:header["size"]]
    assert peer.ask(dict(header, cmd="put"), mine, {"sha256": sha(mine)})["name"] == header["name"]
    assert server.stored(header["name"]) == mine and len(tree(os.path.join(server.upload, folder))) == 1


def test_partial_that_is_longer_than_the_file_is_no_start_of_it(server, peer):
    name, identity = unique(), upload_id()
    server.cut_upload(name, content(1000), 600, id=identity)
    assert peer.ask({"cmd": "resume", "name": name, "size": 500, "id": identity})["offset"] == 0


@in_all_modes_at_once
def test_partial_older_than_a_day_is_removed(mode, folder):
    young, back, ahead, data = upload_id(), upload_id(), upload_id(), content(1000)
    with serve(mode, folder) as server:
        server.cut_upload("x", data, 600, id=upload_id())
        server.cut_upload("y", data, 600, id=upload_id())
        old, future = time.time() - 90000, time.time() + 90000
        for name, mtime in zip(server.partials(), [old, future]):       # the latter as a put may ask for
            os.utime(os.path.join(server.upload, ".partial", name), (old, mtime))
        server.cut_upload("x", data, 700, id=young)
        os.utime(os.path.join(server.upload, ".partial", young), (time.time() - 80000, 0))
        server.cut_upload("z", data, 800, id=back)
        os.utime(os.path.join(server.upload, ".partial", back), (old, time.time() + 600))       # the clock was set back
        server.cut_upload("z", data, 900, id=ahead)
        os.utime(os.path.join(server.upload, ".partial", ahead), (future, future))      # far back: nobody knows how old it is
    with serve(mode, folder) as server, server.peer() as peer:
        wait_for(lambda: sorted(server.partials().values()) == [700, 800, 900])
        assert peer.ask({"cmd": "resume", "name": "x", "size": 1000, "id": young})["offset"] == 700


@in_all_modes_at_once
def test_partial_that_grows_old_is_removed_by_the_server_that_runs(mode, folder):
    assert ftp_server.SWEEP_EVERY <= 86400  # seconds
    identity, data = upload_id(), content(1000)
    with serve(mode, folder, patch="import ftp_server; ftp_server.SWEEP_EVERY = 0") as server, server.peer() as peer:
        server.cut_upload("x", data, 600, id=identity)
        os.utime(os.path.join(server.upload, ".partial", identity), (time.time() - 90000,) * 2)
        wait_for(lambda: peer.put("y", data)["ok"] and server.partials() == {})  # at first the cut put may still lock it


@posix
@in_all_modes_at_once
def test_old_partial_that_another_server_is_writing_is_not_removed(mode, folder):
    identity, data = upload_id(), content(1000)
    with serve(mode, folder) as server, server.begin_upload("x", data, 600, id=identity) as peer:
        os.utime(os.path.join(server.upload, ".partial", identity), (time.time() - 90000,) * 2)
        with serve(mode, folder):  # which looks for old ones as it starts
            pass
        assert peer.ask(data[600:], {"sha256": sha(data)})["ok"]
        assert server.stored("x") == data


def test_file_that_shrinks_meanwhile_is_cut_off(server, peer):
    path = os.path.join(server.download, unique())
    sparse(path, 64 * MIB)
    answer = peer.ask({"cmd": "get", "name": os.path.basename(path)})
    sparse(path, MIB)
    assert len(peer.rest()) < answer["size"]


STAMPS = {  # what there is to tell that a file changed
    "by its stamps": "import ftp_%s as script; script.FRESH = 0",
    "by its content": "import ftp_%s as script; script.FRESH, now = 60, script.os.fstat\n" + """
def stamped(fd, first={}):  # a clock that stands still
    return first.setdefault(now(fd).st_ino, now(fd))
script.os.fstat = stamped
"""}


@pytest.mark.parametrize("verify", [True, False], ids=["verified", "not verified"])
@cases("patch, hidden", {"openly": (STAMPS["by its stamps"], False), "within a tick": (STAMPS["by its content"], False),
                         "with its old time and one more name": pytest.param(STAMPS["by its stamps"], True, marks=posix)})
@in_all_modes_at_once
def test_file_that_changes_meanwhile_is_never_called_whole(mode, folder, patch, hidden, verify):
    size = 32 * MIB
    with serve(mode, folder, patch=patch % "server") as server, server.peer() as peer:
        path = server.serves("x", b"1" * size)
        before = os.stat(path)
        answer = peer.ask({"cmd": "get", "name": "x", "verify": verify})
        assert answer["size"] == size
        with open(path, "r+b") as file:
            file.write(b"2" * size)
        if hidden:
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
            os.link(path, path + "-linked")
        assert b"2" in peer.read(size)
        assert peer.line()["code"] == "changed"
        server.serves("y", b"as it was")
        peer.send({"cmd": "get", "name": "y", "verify": verify})
        assert peer.line()["ok"] and peer.read(9) == b"as it was"
        assert peer.line() == {"ok": True, "sha256": sha(b"as it was") if verify else None}


@posix
def test_file_that_is_replaced_meanwhile_is_whole_all_the_same(server, peer):
    name, data = unique(), content(32 * MIB)
    path = server.serves(name, data)
    assert peer.ask({"cmd": "get", "name": name})["size"] == len(data)
    os.replace(server.serves(name + "-new", b"new"), path)
    assert peer.read(len(data)) == data and peer.line()["sha256"] == sha(data)


# ==== Files: faults and kill -9 at every operation ==================================================================


@posix
@pytest.mark.skipif(not hasattr(os, "splice"), reason="splice(2) came to Python in 3.10, and is Linux' own")
@in_all_modes_at_once
def test_file_system_without_splice_stores_what_nobody_verifies(mode, folder):
    faults, data = Faults(folder), content(3 * MIB)
    with serve(mode, folder, faults=faults) as server, server.peer() as peer:
        faults.arm("raise", ["splice"], error=errno.EINVAL)
        assert peer.put("x", data, verify=False)["ok"] and faults.struck()
        assert server.stored("x") == data


@linux
@in_all_modes_at_once
def test_urgent_byte_in_the_middle_of_an_upload_holds_it_not_up(mode, folder):
    data = content(3 * MIB)
    with serve(mode, folder) as server, server.begin_upload("x", data, 300000, verify=False) as peer:
        peer.sock.send(b"!", socket.MSG_OOB)  # beside the stream; splice(2) stops there, and is ready all the same
        assert peer.ask(data[300000:], {"sha256": None})["ok"]
        assert server.stored("x") == data


@posix
@in_all_modes_at_once
def test_put_after_a_resume_that_failed_starts_afresh(mode, folder):
    faults, data, identity = Faults(folder), content(600000), upload_id()
    with serve(mode, folder, faults=faults) as server:
        server.cut_upload("x", data, 599000, id=identity)
        with server.peer() as peer:
            faults.arm("raise", ["read"], at=2)
            assert peer.ask({"cmd": "resume", "name": "x", "size": len(data), "id": identity})["code"] == "server-error"
            faults.disarm()
            assert peer.put("x", data, id=identity)["ok"]


@posix
@in_all_modes_at_once
def test_error_at_any_look_at_a_partial_leaves_none(mode, folder):
    faults = Faults(folder)
    with serve(mode, folder, faults=faults) as server, server.peer() as peer:
        for number in range(1, 20):
            faults.arm("raise", ["open", "stat", "fstat"], at=number)
            answer = peer.put("x%d" % number, b"123")
            if not faults.struck():
                break
            assert answer["code"] == "server-error" and not server.partials()
        assert 5 < number < 19


@posix
@in_all_modes_at_once
def test_partial_that_cannot_be_removed_is_one_line_in_the_log(mode, folder):
    faults = Faults(folder)
    with serve(mode, folder, faults=faults) as server:
        with server.peer() as peer:
            assert peer.ask({"cmd": "resume", "name": "x", "size": 9, "id": upload_id()})["ok"]
            faults.arm("raise", ["unlink"])
        wait_for(lambda: "a partial file stays" in server.log())  # and no traceback, see Server.stop()


def finish_upload(server, name, data, identity, offset=None):
    """Resume an upload (at offset, if given) and see that it ends whole under its own name."""
    with server.peer() as peer:
        answer = peer.ask({"cmd": "resume", "name": name, "size": len(data), "id": identity})
        assert answer["ok"] and offset in (None, answer["offset"])
        assert answer["sha256"] == sha(data[:answer["offset"]])
        answer = peer.put(name, data, offset=answer["offset"], id=identity)
        assert (answer["ok"], answer["name"], answer["sha256"]) == (True, name, sha(data))
    assert server.stored(name) == data


@posix
@in_all_modes_at_once
def test_kill_at_any_operation_leaves_the_upload_whole_or_resumable(mode, folder):
    faults = Faults(folder)
    unfinished = None
    for number in range(1, 80):
        with serve(mode, folder, faults=faults) as server:
            if unfinished:
                finish_upload(server, *unfinished)
            faults.arm("kill", at=number)
            name, data, identity = "folder%d/x.bin" % number, content(600000, number), upload_id()
            with contextlib.suppress(ConnectionError), server.peer() as peer:
                peer.put(name, data, id=identity)
            if not faults.struck():
                break
            server.kill()
            assert server.stored(name) in (None, data)
            kept = max(server.partials().values()) if server.partials() else 0
            unfinished = name, data, identity, kept if server.stored(name) is None else None
            faults.disarm()
    assert 5 < number < 79


@posix
@in_all_modes_at_once
def test_file_published_at_the_instant_of_a_kill_is_never_written_to_again(mode, folder):
    faults, identity = Faults(folder), upload_id()
    old, new = content(300000, 1), content(300000, 2)
    with serve(mode, folder, faults=faults) as server, server.peer() as peer:
        faults.arm("kill", ["unlink", "remove"])  # where it has two names for a moment
        with contextlib.suppress(ConnectionError):
            peer.put("x", old, id=identity)
        server.kill()
        faults.disarm()
    with serve(mode, folder) as server, server.peer() as peer:
        assert server.stored("x") == old
        assert server.stored(peer.put("x", new, id=identity)["name"]) == new
        assert server.stored("x") == old


@pytest.mark.parametrize("first", ["newer", "older"])
def test_of_two_that_wait_for_an_upload_the_newer_one_gets_it(tmp_path, first):
    storage, cut = ftp_server.Storage(str(tmp_path), str(tmp_path)), []
    list(storage.claim("id", lambda at_once: cut.append("holder")))
    waiting = {who: storage.claim("id", lambda at_once, who=who: cut.append(who)) for who in ("older", "newer")}
    for who in ("older", "newer"):
        assert next(waiting[who]) == ftp_server.BLOCKS
    assert cut == ["holder", "holder"]
    del storage.claims["id"]
    assert list(waiting[first]) == []
    if first == "newer":
        with pytest.raises(ftp_server.Refusal, match="another session"):
            next(waiting["older"])
    else:
        assert next(waiting["newer"]) == ftp_server.BLOCKS
    assert cut[2:] == ([] if first == "newer" else ["older"])


@posix
def test_partial_published_by_another_server_before_the_lock_is_never_written_to_again(tmp_path, monkeypatch):
    storage, lock, identity = ftp_server.Storage(str(tmp_path), str(tmp_path)), ftp_server.lock, upload_id()

    def late(fd):
        monkeypatch.setattr(ftp_server, "lock", lock)
        os.rename(str(tmp_path / ".partial" / identity), str(tmp_path / "x"))
        lock(fd)

    (tmp_path / ".partial").mkdir()
    (tmp_path / ".partial" / identity).write_bytes(b"whole")
    monkeypatch.setattr(ftp_server, "lock", late)
    assert list(storage.claim(identity, None)) == []
    with ftp_server.Upload(storage, ["x"], 5, identity) as upload:
        assert upload.length == 0
        upload.write(b"other")
    assert (tmp_path / "x").read_bytes() == b"whole"


@pytest.mark.parametrize("verify", [True, False], ids=["verified", "not verified"])
@in_all_modes_at_once
def test_kill_loses_nothing_that_came_a_moment_ago(mode, folder, verify):
    data, identity = content(300000), upload_id()
    with serve(mode, folder) as server, server.begin_upload("x", data, 200000, id=identity, verify=verify):
        wait_for(lambda: list(server.partials().values()) == [200000])
        server.kill()
    with serve(mode, folder) as server:
        finish_upload(server, "x", data, identity, 200000)


@posix
@cases("error, code, verify", {"EIO": (errno.EIO, "server-error", True), "ENOSPC": (errno.ENOSPC, "disk-full", True),
                               "EACCES": (errno.EACCES, "denied", True),
                               "not verified": (errno.ENOSPC, "disk-full", False)})
@in_all_modes_at_once
def test_error_at_any_operation_is_told_and_the_upload_can_be_repeated(mode, folder, error, code, verify):
    faults = Faults(folder)
    with serve(mode, folder, faults=faults) as server:
        for number in range(1, 80):
            faults.arm("raise", at=number, error=error)
            name, data, identity = "folder%d/x.bin" % number, content(600000, number), upload_id()
            with server.peer() as peer:
                answer = peer.put(name, data, id=identity, verify=verify)
            struck = faults.struck()
            faults.disarm()
            stored = server.stored(name)
            assert answer["ok"] or answer["code"] in (code, "server-error")  # the latter for the last step
            assert stored == data or (stored is None and not answer["ok"])
            finish_upload(server, name, data, identity)
            if not struck:
                break
        assert 5 < number < 79


@posix
@cases("size, verify", {"small": (4096, True), "large": (400000, True), "not verified": (400000, False)})
@in_all_modes_at_once
def test_error_at_any_operation_leaves_the_requests_behind_it_alone(mode, folder, size, verify):
    faults = Faults(folder)
    with serve(mode, folder, faults=faults) as server:
        for number in range(1, 80):
            faults.arm("raise", at=number, error=errno.ENOSPC)
            names = ["%s%d" % (letter, number) for letter in "ab"]
            with server.peer() as peer:
                for name in names:
                    data = content(size, number)
                    peer.send(put_header(name, data, verify=verify), data, {"sha256": sha(data)})
                answers = [peer.line() for _ in names]
                assert peer.hello()["ok"]
            struck = faults.struck()
            faults.disarm()
            for name, answer in zip(names, answers):
                assert server.stored(name) == data or (server.stored(name) is None and not answer["ok"])
            if not struck:
                break
        assert 5 < number < 79


@posix
@in_all_modes_at_once
def test_error_while_reading_never_ends_as_a_whole_file(mode, folder):
    faults, data = Faults(folder), content(3 * MIB)
    with serve(mode, folder, faults=faults) as server:
        for number in range(1, 200):
            server.serves("x%d" % number, data)
            faults.arm("raise", READING, at=number, last=number + 1)
            with server.peer() as peer:
                peer.send({"cmd": "get", "name": "x%d" % number})
                with contextlib.suppress(Hangup):
                    answer = peer.line()
                    if answer["ok"]:
                        payload, last = peer.read(len(data)), peer.line()
                        assert last.get("code") in CODES or (payload == data and last["sha256"] == sha(data))
            if not faults.struck():
                break
            faults.disarm()
            assert server.alive()
        assert 3 < number < 199


@posix
@cases("operations, at", {"flush": (FLUSHING, 1), "rename": (PUBLISHING, 1), "flush of the folder": (FLUSHING, 2)})
@in_all_modes_at_once
def test_ok_is_said_only_after_flush_and_rename(mode, folder, operations, at):
    faults, data = Faults(folder), content(1000)
    with serve(mode, folder, faults=faults) as server, server.peer() as peer:
        faults.arm("hold", operations, at)
        peer.send(put_header("x", data), data, {"sha256": sha(data)})
        wait_for(faults.struck)
        peer.sock.settimeout(0.2)
        with pytest.raises(socket.timeout):
            peer.sock.recv(1)
        assert at == 2 or "x" not in server.uploads()
        peer.sock.settimeout(PATIENCE)
        faults.disarm()
        assert peer.line()["ok"]
        assert server.uploads()["x"] == data


@posix
@in_all_modes_at_once
def test_failed_flush_is_an_error_and_only_the_last_may_leave_the_file(mode, folder):
    faults, data = Faults(folder), content(1000)
    with serve(mode, folder, faults=faults) as server, server.peer() as peer:
        faults.arm("raise", FLUSHING, at=1)
        assert peer.put("file", data)["code"] == "server-error"
        assert "file" not in server.uploads()
        faults.arm("raise", FLUSHING, at=2)
        assert peer.put("folder", data)["code"] == "server-error"
        assert server.uploads().get("folder") in (None, data)
        faults.disarm()
        assert peer.put("folder", data)["name"] == "folder"


@posix
@in_all_modes_at_once
def test_new_folders_are_flushed_too(mode, folder):
    faults = Faults(folder)
    with serve(mode, folder, faults=faults) as server, server.peer() as peer:
        faults.arm("raise", FLUSHING, at=4)  # the file, the two folders that hold the new ones, the one that holds the file
        assert peer.put("new/deep/x", b"x")["code"] == "server-error" and faults.struck()


@posix
@in_all_modes_at_once
def test_no_fsync_stores_without_flushing(mode, folder):
    faults = Faults(folder)
    with serve(mode, folder, "--no-fsync", faults=faults) as server, server.peer() as peer:
        faults.arm("raise", FLUSHING, last=99)
        assert peer.put("x", b"data")["ok"]
        assert not faults.struck()


@posix
@in_all_modes_at_once
def test_disk_without_hard_links_keeps_both_all_the_same(mode, folder):
    faults = Faults(folder)
    with serve(mode, folder, faults=faults) as server, server.peer() as peer:
        faults.arm("raise", ["link"], last=99, error=errno.EPERM)
        assert [peer.put("x", data)["name"] for data in (b"one", b"two", b"one")] == ["x", "x-2", "x"]
        assert server.uploads() == {"x": b"one", "x-2": b"two"}


def disk_fills(server, name, **header):
    """Put more than the disk holds, as told; see that others are served meanwhile, and that what came takes no room."""
    data = content(3 * MIB)
    with server.peer() as other, server.peer() as peer:
        with contextlib.suppress(ConnectionError):
            peer.send(put_header(name, data, **header), data, {"sha256": sha(data)})
        assert peer.line()["code"] == "disk-full"
        assert other.put("small", b"small")["ok"]
    assert name not in server.uploads()
    wait_for(lambda: not server.partials())


@posix
@in_all_modes_at_once
def test_full_disk_is_told_and_the_server_recovers(mode, folder):
    faults = Faults(folder)
    with serve(mode, folder, faults=faults) as server:
        for first, header in ((1, {}), (2, {"id": upload_id()})):
            faults.arm("raise", ["write", "pwrite", "writev", "splice", "posix_fallocate"], at=first, error=errno.ENOSPC)
            disk_fills(server, "x", **header)
        faults.disarm()
        with server.peer() as peer:
            assert peer.put("x", content(3 * MIB))["ok"]


@linux
@in_all_modes_at_once
def test_full_real_disk_is_told_and_the_server_recovers(mode, folder):
    disk = folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if subprocess.call(mount, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
        pytest.skip("only root can mount a small disk; the test above fills one by injection")
    try:
        with serve(mode, folder, "--upload", str(disk)) as server:
            server.upload = str(disk)
            disk_fills(server, "x")
            with server.peer() as peer:
                assert peer.put("x", content(MIB))["ok"]
                assert peer.put("y", content(MIB, 1))["code"] == "disk-full"
                os.unlink(str(disk / "x"))
                assert peer.put("y", content(MIB, 1))["ok"]
    finally:
        subprocess.check_call(["umount", str(disk)])


# ==== Files: links ==================================================================================================


@posix
def test_link_in_the_download_folder_leads_nowhere(server, peer, tmp_path):
    folder = unique("d")
    (tmp_path / "secret.txt").write_bytes(b"secret")
    server.serves(folder + "/x", b"")
    os.symlink(str(tmp_path / "secret.txt"), os.path.join(server.download, folder, "file"))
    os.symlink(str(tmp_path), os.path.join(server.download, folder, "link"))
    for name in (folder + "/file", folder + "/link/secret.txt", folder + "/link"):
        assert peer.get(name)[0]["code"] in ("denied", "not-found", "not-a-file")
    assert set(peer.ls(folder, recursive=True)) == {"x"}
    assert peer.ask({"cmd": "ls", "path": folder + "/link"})["ok"] is False


@posix
@pytest.mark.parametrize("options", [[], ["--overwrite"]], ids=["keep both", "overwrite"])
@in_all_modes_at_once
def test_link_in_the_upload_folder_is_never_written_through(mode, folder, options):
    outside = os.path.dirname(fill(folder / "outside", {"victim.txt": b"before"}))
    with serve(mode, folder, *options) as server, server.peer() as peer:
        os.symlink(os.path.join(outside, "victim.txt"), os.path.join(server.upload, "file"))
        os.symlink(os.path.join(outside, "nothing"), os.path.join(server.upload, "dangling"))
        os.symlink(outside, os.path.join(server.upload, "link"))
        assert peer.put("link/victim.txt", b"after")["code"] == "denied"
        assert peer.put("link/new.txt", b"after")["code"] == "denied"
        for name in ("file", "dangling", "link"):
            answer = peer.put(name, b"after")
            assert answer["ok"] is False or server.stored(answer["name"]) == b"after"
    assert tree(outside) == {"victim.txt": b"before"}


@posix
@in_all_modes_at_once
def test_overwriting_replaces_files_only(mode, folder):
    with serve(mode, folder, "--overwrite") as server, server.peer() as peer:
        os.mkfifo(os.path.join(server.upload, "fifo"))
        fill(server.upload, {"folder": None, "file": b"before"})
        os.symlink("file", os.path.join(server.upload, "link"))
        for name in ("fifo", "folder", "link"):
            assert peer.put(name, b"after")["code"] == "not-a-file"
        assert server.uploads() == {"fifo": "special", "folder": None, "link": "special", "file": b"before"}
        with server.begin_upload("late", b"after", 2) as late:
            os.mkfifo(os.path.join(server.upload, "late"))
            assert late.ask(b"ter", {"sha256": sha(b"after")})["code"] == "not-a-file"
        assert server.uploads()["late"] == "special"


@posix
@in_all_modes_at_once
def test_partial_folder_that_is_a_link_is_not_followed(mode, folder):
    outside = os.path.dirname(fill(folder / "outside", {"0" * 64: b"before"}))
    with serve(mode, folder) as server, server.peer() as peer:
        partial = os.path.join(server.upload, ".partial")
        assert peer.put("x", b"x")["ok"]
        with server.begin_upload("y", content(1000), 500, id=upload_id()) as other:
            os.rename(partial, partial + "-away")
            os.symlink(outside, partial)
            other.send(content(1000)[500:], {"sha256": sha(content(1000))})
            other.line()
        peer.put("z", b"z", id="0" * 64)
        peer.put("z", b"z")
        assert peer.hello()["ok"]
    assert tree(outside, hidden=True) == {"0" * 64: b"before"}


@posix
def test_partial_that_is_no_file_is_not_written_to(server, peer):
    identity, name = upload_id(), unique()
    assert peer.put(unique(), b"x")["ok"]  # makes the folder
    os.mkfifo(os.path.join(server.upload, ".partial", identity))
    assert peer.put(name, b"content", id=identity)["ok"]
    assert server.stored(name) == b"content"


@posix
def test_partial_swapped_for_a_link_meanwhile_is_not_published(server, tmp_path):
    secret, name, identity = fill(tmp_path, {"secret": b"secret"}), unique(), upload_id()
    with server.begin_upload(name, b"payload", 3, id=identity) as peer:
        path = os.path.join(server.upload, ".partial", identity)
        os.unlink(path)
        os.symlink(secret, path)
        assert peer.ask(b"load", {"sha256": sha(b"payload")})["code"] == "server-error"
        assert not os.path.lexists(os.path.join(server.upload, name))


@posix
@in_all_modes_at_once
def test_folder_swapped_for_a_link_meanwhile_leads_nowhere(mode, folder):
    outside = os.path.dirname(fill(folder / "outside", {"secret": b"secret"}))
    done = threading.Event()

    def swap(path):
        """Let path be a folder and a link by turns."""
        os.mkdir(path)
        while not done.is_set():
            with contextlib.suppress(OSError):
                os.rename(path, path + "-%d" % next(counter))
                os.symlink(outside, path)
            with contextlib.suppress(OSError):
                os.unlink(path)
                os.mkdir(path)

    def attack():
        try:
            with server.peer() as peer:
                for number in range(150):
                    peer.put("d/x%d" % number, b"payload")
                    assert peer.get("d/secret")[0]["ok"] is False
                    listing = peer.ask({"cmd": "ls", "path": "d"})
                    assert not listing["ok"] or b"secret" not in peer.read(listing["size"])
        finally:
            done.set()

    with serve(mode, folder) as server:
        paths = [os.path.join(parent, "d") for parent in (server.upload, server.download)]
        at_once(attack, *[lambda path=path: swap(path) for path in paths])
    assert tree(outside) == {"secret": b"secret"}


# ==== Broken peers: time limits, takeover, cuts =====================================================================


@early
@in_all_modes_at_once
def test_silent_peers_are_dropped(mode, folder):
    with serve(mode, folder, "--timeout", "2.5") as server:

        def dropped(*parts, told=True, settle=lambda peer: None):
            """Send parts and then nothing; the server ends it after its time limit, and says why where it can."""
            start = time.monotonic()
            with server.peer() as peer:
                peer.send(*parts)
                settle(peer)
                answer = peer.rest()
                assert 2 < time.monotonic() - start < 7
                assert not told or json.loads(answer.decode("utf-8"))["code"] == "timeout"

        data = b"x" * 1000
        at_once(
            lambda: dropped(b"", told=False),
            lambda: dropped({"cmd": "hello"}, settle=lambda peer: peer.line()),
            lambda: dropped(b'{"cmd":'),
            lambda: dropped(put_header("x", data), data[:500]),
            lambda: dropped(put_header("y", data), data),
            lambda: dropped(b"put|z|1000", told=False, settle=lambda peer: peer.read(2)),
            lambda: dropped(b"get|z", told=False))
        assert server.uploads() == {}
        levels = re.findall("([A-Z]+) [^ ]+ request refused", server.log())
        assert sorted(levels) == ["INFO"] * 2 + ["WARNING"] * 2     # two are idle, two have sent half a request


@early
@in_all_modes_at_once
def test_peer_that_never_reads_is_dropped(mode, folder):
    with serve(mode, folder, "--timeout", "2", "--max-clients", "1") as server:
        sparse(os.path.join(server.download, "big"), 256 * MIB)
        with server.peer() as peer:
            start = time.monotonic()
            peer.send({"cmd": "get", "name": "big"})
            wait_for(server.alive, 10)
            assert time.monotonic() - start > 0.5
            assert len(peer.rest()) < 256 * MIB


@early
@in_all_modes_at_once
def test_header_must_be_complete_in_time_however_busy_the_peer(mode, folder):
    assert ftp_server.HEADER_TIME == 10  # seconds: too long to wait for in a test
    with serve(mode, folder, patch="import ftp_server; ftp_server.HEADER_TIME = 1") as server:

        def drip(start):
            with server.peer() as peer:
                begin = time.monotonic()
                peer.send(start)
                while not select.select([peer.sock], [], [], 0.1)[0] and time.monotonic() - begin < 10:
                    peer.send("x")
                assert 0.5 < time.monotonic() - begin < 6
                assert not says_ok(peer.rest())

        at_once(lambda: drip('{"cmd":"'), lambda: drip("get|"))


@posix
@early
@in_all_modes_at_once
def test_slow_but_steady_peer_is_never_cut(mode, folder):
    """Each takes far longer than the server's time limit, and between two of its bytes a busy machine may stand still for seconds."""
    with serve(mode, folder, "--timeout", "4") as server:
        data = content(6 * MIB)
        server.serves("slow", data)

        def put_slowly():
            with server.peer() as peer:
                peer.send(put_header("x", data[:12]))
                peer.dribble(data[:12], 0.6)
                assert peer.ask({"sha256": sha(data[:12])})["ok"]

        def put_slowly_classic():
            with server.peer() as peer:
                peer.send("put|y|12")
                assert peer.read(2) == b"OK"
                peer.dribble(data[:12], 0.6)
            wait_for(lambda: server.stored("y") == data[:12])

        def get_slowly(piece):
            """Take a piece every 0.3 s for a while, then the rest."""
            with server.slow_peer(2 * piece) as peer:
                assert peer.ask({"cmd": "get", "name": "slow"})["size"] == len(data)
                taken = b""
                for _ in range(25):
                    taken += peer.read(piece)
                    time.sleep(0.3)
                assert taken + peer.read(len(data) - len(taken)) == data
                assert peer.line()["sha256"] == sha(data)

        at_once(put_slowly, put_slowly_classic, lambda: get_slowly(16 * KIB), lambda: get_slowly(4 * KIB))


@pytest.mark.parametrize("how", ["close", "reset"])
def test_peer_that_breaks_off_disturbs_nobody(server, how):
    name = unique()
    sparse(os.path.join(server.download, name), 64 * MIB)
    for parts in ([], [b"{"], [b"put|x"], [{"cmd": "hello"}], [{"cmd": "get", "name": name}], ["get|%s|0" % name],
                  ["put|x|1000"], [put_header("x", b"y" * 1000), b"y" * 500], [{"cmd": "ls"}] * 100):
        peer = server.peer()
        peer.send(*parts)
        getattr(peer, how)()
        assert server.alive()


def test_half_closed_connection_still_gets_its_answers(server):
    name, data = unique(), content(3 * MIB)
    server.serves(name, data)
    with server.peer() as peer:
        peer.send({"cmd": "get", "name": name}, put_header(name, b"hi"), b"hi", {"sha256": sha(b"hi")})
        peer.sock.shutdown(socket.SHUT_WR)
        assert peer.line()["ok"] and peer.read(len(data)) == data and peer.line()["ok"]
        assert peer.line()["name"] == name
        assert peer.closed()


@pytest.mark.parametrize("resume", [True, False], ids=["by resume", "by put"])
def test_client_that_comes_back_takes_over_its_upload(server, peer, resume):
    name, data, identity = unique(), content(300000), upload_id()
    with server.begin_upload(name, data, 200000, id=identity) as older:
        offset = 0
        if resume:
            answer = peer.ask({"cmd": "resume", "name": name, "size": len(data), "id": identity})
            offset = answer["offset"]
            assert answer["sha256"] == sha(data[:offset])
        assert peer.put(name, data, offset=offset, id=identity)["sha256"] == sha(data)
        assert not says_ok(older.rest())
    assert server.stored(name) == data


@cases("size, pause", {"is sending": (8 * MIB, 0.1), "has sent all": (600000, 2)})
@in_all_modes_at_once
def test_client_whose_upload_is_taken_over_is_told_and_does_not_come_back(mode, folder, size, pause):
    data, work = content(size), folder / "work"
    fill(work, {"x": data})
    patch = "import ftp_server; ftp_server.TELL_TIME = ftp_server.TAKEOVER_TIME = 20"     # the line may falter
    with serve(mode, folder, patch=patch) as server, Proxy(server.port, hold=("up", 300000), pause=pause) as line, \
            ThreadPoolExecutor(1) as pool:
        older = pool.submit(client, line.port, "put", "x", cwd=work)
        assert line.held.wait(PATIENCE)
        identity, = server.partials()
        with server.peer() as newer:
            assert newer.put("x", data, id=identity)["ok"]
        assert older.result() == (1, "", "x: a newer session took over (busy)\n") and line.connections == 1
        assert server.uploads() == {"x": data}


def test_answer_that_is_under_way_comes_before_the_word_of_a_takeover():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        wire = ftp_server.Wire(ours, PATIENCE)
        wire.cut = refusal = ftp_server.Refusal("busy", "a newer session took over", closes=True)
        assert list(wire.send_now(b"answer").__await__()) and theirs.recv(100) == b"answer"
        with pytest.raises(ftp_server.Refusal) as raised:
            list(wire.fill().__await__())
        assert raised.value is refusal and wire.cut is None  # so it can be sent, and the client has time to read it


def test_system_that_gives_a_peer_up_is_believed_at_once(monkeypatch):
    monkeypatch.setattr(ftp_server, "WAKE", 0.5)  # as on Windows
    ours, theirs = socket.socketpair()
    with ours, theirs:
        operation = mock.Mock(side_effect=OSError(errno.ETIMEDOUT, "timed out"))
        with pytest.raises((ftp_server.TimedOut, ftp_server.Gone)):
            list(ftp_server.Wire(ours, PATIENCE).attempt(ftp_server.READ, operation).__await__())
    assert operation.call_count == 1


@linux
@posix
@in_all_modes_at_once
def test_resume_that_fails_keeps_no_lock(mode, folder):
    faults, data, identity = Faults(folder), content(1000), upload_id()
    with serve(mode, folder, faults=faults) as server, server.peer() as peer:
        server.cut_upload("x", data, 600, id=identity)
        path = os.path.join(server.upload, ".partial", identity)
        wait_for(lambda: not is_locked(path))
        faults.arm("raise", ["read"], last=99)
        assert peer.ask({"cmd": "resume", "name": "x", "size": 1000, "id": identity})["code"] == "server-error"
        faults.disarm()
        assert peer.ask({"cmd": "hello"})["ok"] and not is_locked(path)


WINDOWS = """
import os, ftp_%s as script  # what differs there, as far as another system can play it
os.name, script.HAS_POLL, script.HAS_DIR_FD = "nt", False, False
os.supports_fd, os.supports_follow_symlinks, os.supports_dir_fd = set(), set(), set()
for name in ("sendfile", "splice"):
    getattr(os, name, None) and delattr(os, name)
flock, script.fcntl = script.fcntl.flock, None

class CRuntime:
    LK_NBLCK = 2

    def locking(fd, mode, count):
        assert (mode, count) == (2, 1) and os.lseek(fd, 0, os.SEEK_CUR) < 1 << 31  # else: "Invalid argument"
        flock(fd, 6)  # LOCK_EX | LOCK_NB

script.msvcrt = CRuntime
"""


@posix
def test_get_on_windows_keeps_its_lock_until_the_file_has_its_name(lone, work):
    lone.serves("x", b"hello")
    patch = WINDOWS % "client" + """
def link(source, target, link=os.link, **how):
    with open(source) as other:
        try:
            flock(other, 6)
        except BlockingIOError:
            return link(source, target, **how)
        raise AssertionError("another client could have it")
os.link = link
"""
    assert client(lone, "get", "x", cwd=work, patch=patch) == (0, "x: saved as x\n", "")
    assert tree(work, hidden=True) == {"x": b"hello"}


@posix
@in_all_modes_at_once
def test_put_and_get_do_without_what_windows_lacks(mode, folder):
    old, new, stamp = content(300000, 1), content(300000, 2), 1234567890.25
    (folder / "work").mkdir()
    with serve(mode, folder, patch=WINDOWS % "server") as server:
        fill(server.download, {"d/x": new, "d/y": b"", "sub/z": b"z"})
        os.symlink("/etc/hosts", os.path.join(server.download, "link"))
        os.utime(os.path.join(server.download, "d", "x"), (stamp, stamp))
        fill(folder / "work", {"x": old, "d/x": old})
        os.utime(str(folder / "work" / "x"), (stamp, stamp))

        def run_client(*arguments):
            return client(server, *arguments, cwd=folder / "work", patch=WINDOWS % "client")

        assert run_client("put", "x") == (0, "x: stored as x\n", "")
        assert run_client("put", "x") == (0, "x: already there as x\n", "")
        assert os.stat(os.path.join(server.upload, "x")).st_mtime == stamp
        assert run_client("put", "-r", "d").code == 0 and server.stored("d/x") == old
        assert run_client("get", "-r", "d").code == 0
        assert tree(folder / "work", hidden=True) == {"x": old, "d": None, "d/x": old, "d/x-2": new, "d/y": b""}
        assert os.stat(str(folder / "work" / "d" / "x-2")).st_mtime == stamp
        assert run_client("get", "-f", "d/x").code == 0 and (folder / "work" / "x").read_bytes() == new
        for name in ("sub", "link"):
            assert "not-a-file" in run_client("get", name).err
        assert run_client("get", "sub/z").code == 0 and server.partials() == {}


@posix
@in_all_modes_at_once
def test_takeover_does_without_a_shutdown_that_wakes(mode, folder):
    """As on Windows, where select() does not notice one."""
    patch, data, identity = """
import ftp_server, socket
ftp_server.WAKE, socket.socket.shutdown = 0.1, lambda self, how: None
""", content(1000), upload_id()
    with serve(mode, folder, patch=patch) as server, server.begin_upload("x", data, 600, id=identity), server.peer() as newer:
        assert newer.ask({"cmd": "resume", "name": "x", "size": 1000, "id": identity})["offset"] == 600


@posix
@in_all_modes_at_once
def test_client_that_comes_back_takes_over_though_its_partial_is_being_hashed(mode, folder):
    identity = upload_id()
    with serve(mode, folder) as server, server.peer() as older, server.peer() as newer:
        server.cut_upload("x", content(1000), 600, id=identity)
        path = os.path.join(server.upload, ".partial", identity)
        sparse(path, 1 << 36)  # hashing that takes half a minute at least
        wait_for(lambda: not is_locked(path))
        older.send({"cmd": "resume", "name": "x", "size": 1 << 36, "id": identity})
        wait_for(lambda: is_locked(path))
        assert newer.put("x", b"hello", id=identity)["ok"]
        assert older.line()["code"] == "busy" and older.closed()
        assert server.uploads() == {"x": b"hello"}


@in_all_modes_at_once
def test_upload_under_way_in_another_server_is_busy(mode, folder):
    data, identity = content(300000), upload_id()
    ask = {"cmd": "resume", "name": "x", "size": len(data), "id": identity}
    with serve(mode, folder) as one, serve(mode, folder) as two, two.peer() as peer:
        with one.begin_upload("x", data, 200000, id=identity):
            assert peer.ask(ask)["code"] == "busy"
            assert peer.put("x", data, id=identity)["code"] == "busy"
            assert peer.put("other", data, id=upload_id())["ok"]
        assert wait_for(lambda: peer.ask(ask).get("offset")) == 200000
        assert peer.put("x", data, offset=200000, id=identity)["ok"]
        assert two.uploads() == {"x": data, "other": data}


@early
@in_all_modes_at_once
def test_more_than_max_clients_are_told_busy(mode, folder):
    with serve(mode, folder, "--max-clients", "2", patch="import ftp_server; ftp_server.HEADER_TIME = 3") as server:
        with server.peer() as one, server.peer() as two:
            assert one.hello()["ok"] and two.hello()["ok"]
            with server.peer() as framed, server.peer() as classic:
                assert framed.hello()["code"] == "busy"
                assert framed.closed()
                classic.send("get|x|0")
                assert classic.closed()
            with server.peer() as silent:  # has less time than one that is served
                assert silent.rest() == b""
            assert one.hello()["ok"] and two.put("x", b"x")["ok"]
        wait_for(server.alive)


@in_all_modes_at_once
def test_server_turns_away_those_for_whom_there_is_no_room(mode, folder):
    with serve(mode, folder, patch="import ftp_server; ftp_server.SELECTED = 1") as server:
        with server.peer() as one:
            assert one.hello()["ok"]
            with server.peer() as two:
                assert two.line()["code"] == "busy" and one.hello()["ok"]
        wait_for(server.alive)


@posix
@cases("limit, room", {"none": (-1, math.inf), "few": (20, 10), "some": (64, 32), "many": (4096, 3072)})
def test_clients_leave_room_for_files(monkeypatch, limit, room):
    monkeypatch.setattr(ftp_server.resource, "getrlimit", lambda what: (limit, limit))
    assert ftp_server.room_for_clients() == room


# ==== Concurrency: nobody waits for another =========================================================================


def test_many_clients_at_once_move_whole_files(server):
    data = content(300000)
    name = unique()
    server.serves(name, data)

    def client(number):
        mine = data + b"%d" % number
        with server.peer() as peer:
            assert peer.put("%s-%d" % (name, number), mine)["sha256"] == sha(mine)
            assert peer.get(name)[1] == data

    at_once(*[lambda number=number: client(number) for number in range(40)])
    assert all(server.stored("%s-%d" % (name, number)) == data + b"%d" % number for number in range(40))


def put_at_once(servers, name, contents):
    """Put every content under one name at once, by turns to the servers; return the answers."""
    def put(server, data):
        with server.peer() as peer:
            return peer.put(name, data)

    pairs = zip(itertools.cycle(servers), contents)
    return at_once(*[lambda server=server, data=data: put(server, data) for server, data in pairs])


@pytest.mark.parametrize("servers", [1, 2], ids=["one server", "two servers on a folder"])
@in_all_modes_at_once
def test_clients_that_put_one_name_at_once_are_all_stored(mode, folder, servers):
    contents = [content(200000, seed) for seed in range(12)]
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(serve(mode, folder)) for _ in range(servers)]
        answers = put_at_once(running, "x.bin", contents)
    stored = running[0].uploads()
    assert [stored[answer["name"]] for answer in answers] == contents
    assert len(stored) == 12


def test_clients_that_put_one_file_at_once_store_it_once(server):
    name, data = unique(), content(200000)
    answers = put_at_once([server], name, [data] * 12)
    assert {answer["name"] for answer in answers} == {name}
    assert sum(not answer["duplicate"] for answer in answers) == 1


def stopwatch(server, computes):
    """Return what tells the seconds since: where the server computes all the time, those that it had a processor for."""
    start, before = time.monotonic(), server_cpu(server.process)

    def seconds():
        took = time.monotonic() - start
        assert took < 15
        return min(took, server_cpu(server.process) - before) if computes and before is not None else took

    return seconds


def list_for(server, seconds, computes=False):
    """List again and again while a slow thing is under way; no three listings in succession take more than a second each.

    One or two may: where the machine holds up the server or this process, it is not the slow thing that they waited for.
    """
    end, late = time.monotonic() + seconds, 0
    with server.peer() as peer:
        while late or time.monotonic() < end:
            took = stopwatch(server, computes)
            peer.ls()
            late = late + 1 if took() >= 1 else 0
            assert late < 3 and took() < 5


@posix
@cases("operations, count, listing", {
    "flush": (FLUSHING, 20, False), "rename": (PUBLISHING, 20, False), "open": (["open"], 1, False),
    "list": (["scandir", "listdir"], 1, True)})
@in_all_modes_at_once
def test_slow_disk_of_some_makes_nobody_else_wait(mode, folder, operations, count, listing):
    faults, data = Faults(folder), content(1000)
    with serve(mode, folder, faults=faults) as server, contextlib.ExitStack() as stack:
        slow = [stack.enter_context(server.peer()) for _ in range(count)]
        faults.arm("hold", operations, last=count)
        for number, peer in enumerate(slow):
            peer.send(*([{"cmd": "ls"}] if listing else [put_header("x%d" % number, data), data]))
        for peer in [] if listing else slow:
            peer.send({"sha256": sha(data)})
        wait_for(faults.struck)
        list_for(server, 0.1)
        faults.disarm()
        assert all(peer.line()["ok"] for peer in slow)


@posix
@pytest.mark.parametrize("verify", [True, False], ids=["verified", "not verified"])
@in_all_modes_at_once
def test_slow_disk_that_some_are_served_from_makes_nobody_else_wait(mode, folder, verify):
    faults, data = Faults(folder), content(MIB)
    with serve(mode, folder, faults=faults) as server, contextlib.ExitStack() as stack:
        server.serves("x", data)
        faults.arm("hold", ["read", "sendfile"], last=99)
        slow = [stack.enter_context(server.peer()) for _ in range(5)]
        for peer in slow:
            peer.send({"cmd": "get", "name": "x", "verify": verify})
        wait_for(faults.struck)
        list_for(server, 0.1)
        faults.disarm()
        for peer in slow:
            assert peer.line()["size"] == len(data) and peer.read(len(data)) == data and peer.line()["ok"]


def get_together(server, stack, count):
    """Ask for x from so many peers whose requests the server finds all at once; return them."""
    peers = [stack.enter_context(server.peer()) for _ in range(count)]
    assert all(peer.hello()["ok"] for peer in peers)
    server.process.send_signal(signal.SIGSTOP)
    for peer in peers:
        peer.send({"cmd": "get", "name": "x"})
    server.process.send_signal(signal.SIGCONT)
    return peers


def answered(peers, seconds=0):
    """Return the sockets of the peers that an answer has come for, waiting some seconds for the first."""
    return select.select([peer.sock for peer in peers], [], [], seconds)[0]


@posix
@in_all_modes_at_once
def test_disk_that_hangs_for_one_of_many_that_ask_at_once_makes_no_other_wait(mode, folder):
    faults, data = Faults(folder), content(1000)
    with serve(mode, folder, faults=faults) as server, contextlib.ExitStack() as stack:
        server.serves("x", data)
        faults.arm("hold", ["open"])
        peers = get_together(server, stack, 30)
        wait_for(lambda: len(answered(peers)) == len(peers) - 1)
        assert faults.struck()
        faults.disarm()
        for peer in peers:
            assert peer.line()["ok"] and peer.read(len(data)) == data and peer.line()["ok"]


ONE_SLOW_FILE = """
import itertools, os, threading, time
opened, calls, begun = os.open, itertools.count(), threading.Thread.start
def wait_and_open(path, *args, **more):
    if os.path.basename(os.fsencode(path)) == b"x":
        time.sleep(60 if next(calls) else 0.1)
    return opened(path, *args, **more)
os.open = wait_and_open
threading.Thread.start = lambda self: (time.sleep(0.002), begun(self))[1]  # so that many take a while
"""


@posix
@in_all_modes_at_once
def test_disk_that_is_slow_for_one_and_hangs_for_all_others_that_ask_at_once_lets_the_one_go(mode, folder):
    with serve(mode, folder, patch=ONE_SLOW_FILE) as server, contextlib.ExitStack() as stack:
        server.serves("x", b"123")
        assert len(answered(get_together(server, stack, 100), PATIENCE)) == 1


@posix
@at_once_for({"%s in %s mode" % pair: pair for pair in itertools.product(["read", "sendfile", "write"], ftp_server.MODES)})
def test_disk_that_hangs_for_some_makes_nobody_else_wait(pair, folder):
    """As many as may compute at a time stand still; the others have their turn all the same."""
    operation, mode = pair
    faults, data, many = Faults(folder), content(600000), ftp_server.AT_ONCE[ftp_server.COMPUTES]

    def ask(peer, name):
        if operation == "write":
            peer.send(put_header(name, data), data, {"sha256": sha(data)})
        else:
            peer.send({"cmd": "get", "name": "x", "verify": operation == "read"})

    def check(peer):
        answer = peer.line()
        assert answer["ok"] and (operation == "write" or peer.read(len(data)) == data and peer.line()["ok"])

    patch = STAMPS["by its stamps"] % "server"  # for sendfile()
    with serve(mode, folder, faults=faults, patch=patch) as server, contextlib.ExitStack() as stack:
        server.serves("x", data)
        slow = [stack.enter_context(server.peer()) for _ in range(many)]
        faults.arm("hold", [operation], last=many)
        for number, peer in enumerate(slow):
            ask(peer, "slow%d" % number)
        wait_for(lambda: faults.struck(many))
        for number in range(3):
            with server.peer() as peer:
                ask(peer, "quick%d" % number)
                check(peer)
        faults.disarm()
        for peer in slow:
            check(peer)


@posix
@cases("operation, begun, more", {
    "nonsense after a payload": ("unlink", lambda new, old: [put_header("x", b"123"), b"123"], [b"nonsense\n"]),
    "nonsense after a resume": ("unlink", lambda new, old: [new], [b"{nonsense\n"]),
    "another put after a resume": ("unlink", lambda new, old: [new], [put_header("y", b"123"), b"123", {"sha256": None}]),
    "put after a resume": ("truncate", lambda new, old: [old], [b"123", {"sha256": None}])})
@in_all_modes_at_once
def test_partial_that_is_removed_or_cut_on_a_hanging_disk_makes_nobody_else_wait(mode, folder, operation, begun, more):
    faults, data, identity = Faults(folder), content(1000), upload_id()
    new = {"cmd": "resume", "name": "x", "size": 9, "id": upload_id()}
    old = {"cmd": "resume", "name": "z", "size": 1000, "id": identity}
    with serve(mode, folder, faults=faults) as server:
        server.cut_upload("z", data, 500, id=identity)
        with server.peer() as peer:
            peer.send(*begun(new, old))
            if operation == "truncate":
                more = [put_header("z", data, id=identity, offset=peer.line()["offset"])] + more
            assert server.alive()
            faults.arm("hold", [operation])
            peer.send(*more)
            peer.sock.shutdown(socket.SHUT_WR)
            wait_for(faults.struck)
            list_for(server, 0.1)
            faults.disarm()


def begin_resume(server):
    """Let a server hold an upload for a client that says nothing more; return the peer."""
    peer = server.peer()
    assert peer.ask({"cmd": "resume", "name": "x", "size": 5, "id": upload_id()})["offset"] == 0
    return peer


@posix
@cases("begin", {"in the middle of a put": lambda server: server.begin_upload("x", content(MIB), 300000), "after a resume": begin_resume})
@early
@in_all_modes_at_once
def test_server_stops_while_the_disk_hangs(mode, folder, begin):
    faults = Faults(folder)
    with serve(mode, folder, faults=faults) as server, begin(server):
        faults.arm("hold", ["unlink"])
        server.stop()
        assert faults.struck()


@posix
@early
@in_all_modes_at_once
def test_stop_takes_two_seconds_at_most(mode, folder):
    """One of three does, that is: a busy machine may hold up the others."""
    def stop(folder):
        folder.mkdir()
        faults = Faults(folder)
        with serve(mode, folder, faults=faults) as server, server.begin_upload("x", content(MIB), 300000):
            faults.arm("hold", ["unlink"])
            server.stop()
            return server.stop_took

    assert min(at_once(*[lambda name=name: stop(folder / name) for name in "abc"])) < 2


@posix
@early
@in_all_modes_at_once
def test_what_begins_while_the_server_stops_is_not_done(mode, folder):
    faults = Faults(folder)
    with serve(mode, folder, faults=faults) as server, server.peer() as hung, server.peer() as late:
        assert late.hello()["ok"]
        faults.arm("hold", ["fsync"])
        hung.send(put_header("x", b"123"), b"123", {"sha256": None})
        wait_for(faults.struck)

        def begin():
            assert hung.closed()  # so the server has begun to stop, and a second to wait for the disk
            late.send(put_header("y", b"123"), b"123", {"sha256": None})
            return late.rest()

        assert at_once(server.stop, begin)[1] == b""
        faults.disarm()
        assert server.uploads() == {} and len(server.partials()) == 1


@posix
@early
@in_all_modes_at_once
def test_client_that_reads_nothing_gets_no_error_in_the_middle_of_an_answer(mode, folder):
    with serve(mode, folder, "--timeout", "2") as server:
        server.serves("x", content(200000))
        with server.slow_peer() as peer:
            peer.send(wire({"cmd": "get", "name": "x"}) * 40)
            wait_for(lambda: "has read nothing" in server.log())
            assert b'"code"' not in peer.rest()


def test_job_waits_for_a_thread_that_is_there_if_no_more_can_be_had(monkeypatch):
    workers, threads, gate, done = ftp_server.Workers(), [], threading.Event(), threading.Event()

    def job(wait):
        threads.append(threading.get_ident())
        wait()

    workers.submit(job, gate.wait)
    wait_for(lambda: threads)
    monkeypatch.setattr(threading.Thread, "start", mock.Mock(side_effect=RuntimeError("no more")))
    workers.submit(job, done.set)
    assert len(threads) == 1  # nor does the caller do it
    gate.set()
    assert done.wait(PATIENCE) and len(set(threads)) == 1
    wait_for(lambda: workers.idle == 1)
    workers.submit(job, lambda: None)  # for which there is one that is idle
    wait_for(lambda: len(threads) == 3)
    assert threading.Thread.start.call_count == 1
    alone = ftp_server.Workers()
    alone.submit(job, lambda: None)
    assert threads[-1] == threading.get_ident()


def test_thread_keeps_its_turn_until_somebody_waits_for_it():
    turns, other = ftp_server.Turns(1, 60), mock.Mock()
    handler = ftp_server.FtpHandler.__new__(ftp_server.FtpHandler)
    handler.server, handler.gate = types.SimpleNamespace(turns={"kind": turns}), threading.Lock()
    steps = iter(["kind", "kind", "another", "kind", "kind"])
    session = mock.Mock(send=lambda _: next(steps))
    assert handler.in_turn(session, "kind") == "another" and not turns.begun
    session.send = lambda _: (turns.take(other), next(steps))[1]
    assert handler.in_turn(session, "kind") == "kind" and list(turns.begun) == [other] and other.release.called


def test_session_has_the_smaller_a_share_of_time_the_more_there_are(tmp_path):
    service = ftp_server.Service("selectors", None, 60, 1000)
    os.close(service.reserve)
    for count, seconds in ((0, ftp_server.RUN_TIME), (1, ftp_server.RUN_TIME), (1000, ftp_server.ROUND / 1000)):
        service.asking = set(range(count))
        assert service.run_time() == seconds


@pytest.mark.parametrize("more, asks", [(b"", False), (b"{", True)], ids=["all is answered", "more is here"])
def test_session_that_waits_for_a_request_has_no_share(more, asks):
    service = ftp_server.Service("selectors", mock.Mock(max_size=None), 60, 1000)
    os.close(service.reserve)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        session = service.welcome(ours, ("127.0.0.1", 1))
        steps = session.run()
        steps.send(None)
        theirs.sendall(wire({"cmd": "hello"}) + more)
        while not select.select([theirs], [], [], 0)[0]:
            assert steps.send(None)
        assert steps.send(None)[1] == ftp_server.READ and service.asking == ({session} if asks else set())
        service.farewell(session)
        steps.close()
        assert not service.asking


def test_only_so_many_have_a_turn_and_who_stands_still_is_not_counted():
    turns = ftp_server.Turns(2, 60)
    assert [turns.take(who) for who in "abcd"] == [True, True, False, False]
    assert turns.end("a") == ["c"] and turns.relieve() == []
    turns.seconds = -1
    assert turns.relieve() == ["d"]  # instead of b, the oldest: nobody else is in line
    turns.seconds = 60
    assert [turns.take(who) for who in "efg"] == [True, True, False]  # twice as many for a while: who goes instead may hang too
    assert turns.end("b") == []  # another went instead of b already
    turns.late -= 60
    assert turns.relieve() == [] and turns.limit == 2
    assert [turns.end(who) for who in "cdef"] == [[], [], ["g"], []] and turns.end("g") == []
    assert turns.take("h")


def test_ever_more_may_go_where_all_stand_still():
    turns = ftp_server.Turns(2, -1)
    for who in range(1000):
        turns.take(who)
    counts = [len(turns.relieve()) for _ in range(7)]
    assert counts == [4, 8, 16, 32, 64, 64, 64] and ftp_server.MOST == 64


def test_after_a_hang_no_more_may_go_than_before_even_if_nobody_is_in_line():
    turns = ftp_server.Turns(2, -1)
    assert [turns.take(who) for who in "abc"] == [True, True, False] and turns.relieve() == ["c"] and turns.limit == 4
    assert [turns.end(who) for who in "abc"] == [[], [], []]
    turns.late -= 60
    assert turns.relieve() == [] and [turns.take(who) for who in "def"] == [True, True, False]


def test_who_goes_on_and_on_does_not_stand_still():
    turns = ftp_server.Turns(1, 60)
    assert turns.take("a")
    turns.begun["a"] -= 61
    assert turns.keep("a") and not turns.take("b")
    assert turns.relieve() == [] and not turns.keep("a") and turns.end("a") == ["b"]


@posix
@in_all_modes_at_once
def test_hashes_of_huge_prefixes_make_nobody_else_wait(mode, folder):
    with serve(mode, folder) as server, contextlib.ExitStack() as stack:
        sparse(os.path.join(server.download, "huge"), 16 * GIB)
        for _ in range(80):
            peer = stack.enter_context(server.peer())
            peer.send({"cmd": "get", "name": "huge", "offset": 16 * GIB, "sha256": sha(b"")})
        assert server.alive()  # all have come
        list_for(server, 1.2)
        peer.sock.settimeout(0.01)
        with pytest.raises(socket.timeout):
            peer.sock.recv(1)  # it is at it still: this was not a quick hash
        # ... and the server stops in time all the same


@cases("header", {
    "tiny": b"{}\n", "middling": b'{"a":[%s]}\n' % b",".join([b'{"":0}'] * 580),
    "deep": b'{"a":[%s]}\n' % b",".join([b"[" * 96 + b"]" * 96] * 335)})
@in_all_modes_at_once
def test_clients_that_send_requests_without_end_make_nobody_else_wait(mode, folder, header):
    requests, done = header * (MIB // len(header)), threading.Event()

    def flood():
        sent = 0
        with server.peer() as peer:
            peer.sock.settimeout(0.01)
            while not done.is_set():
                with contextlib.suppress(socket.timeout):
                    sent += peer.sock.send(requests[sent % len(header):])
                with contextlib.suppress(socket.timeout):
                    assert peer.sock.recv(MIB)

    def look():
        try:
            list_for(server, 1, computes=True)
        finally:
            done.set()

    with serve(mode, folder, "-q") as server:
        at_once(look, *[flood] * 8)


@linux
@in_all_modes_at_once
def test_clients_that_are_gone_take_no_memory(mode, folder):
    with serve(mode, folder) as server:
        def come_and_go(count):
            for number in range(count):
                with server.peer() as peer:
                    peer.send(b'{"cmd":"' + bytes(60000))
                assert number % 25 or server.alive()  # so it is not far behind
            assert server.alive()

        come_and_go(50)
        before = server.peak_memory()
        come_and_go(300)
        assert server.peak_memory() - before < 6 * MIB


@linux
@in_all_modes_at_once
def test_memory_does_not_grow_with_the_file(mode, folder):
    size, zeros = 192 * MIB, bytes(MIB)
    with serve(mode, folder, "--no-fsync") as server, server.peer() as peer:
        sparse(os.path.join(server.download, "big"), size)
        assert peer.put("warm", zeros)["ok"] and peer.hello()["ok"]
        before = server.peak_memory()
        for verify in (True, False):
            assert peer.ask({"cmd": "get", "name": "big", "verify": verify})["size"] == size
            for _ in range(size // MIB):
                peer.read(MIB)
            peer.line()
        peer.send({"cmd": "put", "name": "big", "size": size})
        for _ in range(size // MIB):
            peer.send(zeros)
        assert peer.ask({"sha256": None})["ok"]
        assert server.peak_memory() - before < 4 * MIB


FEW_DESCRIPTORS = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (%d, %d));"


@linux
@in_all_modes_at_once
def test_crowd_leaves_descriptors_for_the_files_of_those_who_were_here_before(mode, folder):
    with serve(mode, folder, patch=FEW_DESCRIPTORS % (64, 64)) as server, server.peer() as first:
        assert first.hello()["ok"] and server.serves("x", b"x")
        with contextlib.ExitStack() as stack:
            crowd = [stack.enter_context(server.peer()) for _ in range(80)]
            assert crowd[-1].line()["code"] == "busy"
            assert list(first.ls()) == ["x"] and first.get("x")[1] == b"x"
            assert first.put("d/y", b"y")["ok"] and first.put("z", content(MIB), verify=False)["ok"]
        wait_for(server.alive)


def test_stop_cuts_for_no_longer_than_it_may_take():
    service = ftp_server.Service("selectors", None, 60, 10)
    os.close(service.reserve)
    idle, *busy = [mock.Mock(doing=doing, resumed=None) for doing in ("request", "get x", "get y")]
    service.sessions = {idle, *busy}
    for seconds, times in ((-1, 0), (60, 1)):
        service.cut_all(time.monotonic() + seconds)
        assert service.sessions == set(busy) and [session.cut.call_count for session in busy] == [times, times]
    assert idle.wire.cut == busy[0].wire.cut == busy[1].wire.cut == "the server stops" and not idle.cut.called


def test_reserve_that_is_used_up_is_closed_once_and_awaited():
    service = ftp_server.Service("selectors", None, 60, 10)
    full = OSError(errno.EMFILE, "too many open files")
    listener = mock.Mock(accept=mock.Mock(side_effect=full))
    with mock.patch("os.open", side_effect=full), mock.patch("os.close") as close, mock.patch("time.sleep") as sleep:
        for _ in range(3):
            assert service.accept(listener) is None and service.reserve is None
    assert close.call_count == 1 and sleep.call_count == 2  # instead of trying at once, again and again
    assert service.accept(listener) is None and service.reserve is not None
    os.close(service.reserve)
    os.close(close.call_args[0][0])


def test_connection_that_breaks_as_it_is_accepted_costs_the_next_client_nothing():
    service = ftp_server.Service("selectors", None, 60, 10)
    listener = mock.Mock(accept=mock.Mock(side_effect=[OSError(errno.EPROTO, "protocol error"), ("socket", "address")]))
    assert service.accept(listener) is None and service.accept(listener) == ("socket", "address")
    os.close(service.reserve)


@linux
@early
@in_all_modes_at_once
def test_out_of_descriptors_the_server_neither_spins_nor_dies(mode, folder):
    limit = FEW_DESCRIPTORS % (40, 40) + "import ftp_server; ftp_server.room_for_clients = lambda: 1000"
    with serve(mode, folder, patch=limit) as server, server.peer() as first:
        assert first.hello()["ok"]
        at_first = server.open_descriptors()
        with contextlib.ExitStack() as stack:
            crowd = [stack.enter_context(server.peer()) for _ in range(80)]
            assert crowd[-1].line()["code"] == "busy"
            assert first.hello()["ok"]
            before = server_cpu(server.process)
            time.sleep(1)
            assert server_cpu(server.process) - before < 0.5
            assert first.hello()["ok"]
        wait_for(lambda: server.open_descriptors() <= at_first)
        assert server.alive()
        assert first.put("x", b"x")["ok"]


@linux
def test_refused_requests_leave_no_descriptor_open(server, peer):
    server.serves("plain", b"x")

    def ask(cmd, name, **header):
        return peer.ask(dict({"cmd": cmd, "name": name, "path": name, "size": 0}, **header), *[b"{}\n"][:cmd == "put"])

    def ask_all():
        for name in ("../x", "plain/x", "nothing/x", "a" * 256):
            for cmd in ("ls", "get", "mkdir", "put"):
                ask(cmd, name)
            ask("resume", name, id=upload_id())
            ask("put", name, id=upload_id())
        return server.open_descriptors()

    before = ask_all()
    for _ in range(5):
        ask_all()
    assert ask_all() <= before


@posix
@in_all_modes_at_once
def test_out_of_threads_the_server_goes_on(mode, folder):
    faults = Faults(folder)
    with serve(mode, folder, faults=faults) as server:
        faults.arm("raise", ["thread"], last=99)
        for _ in range(5):
            with server.peer() as peer:
                if mode == "selectors":
                    assert peer.put("x", b"x")["ok"]
                else:
                    assert peer.line()["code"] == "busy"
        assert faults.struck()
        faults.disarm()
        with server.peer() as peer:
            assert peer.put("y", b"y")["ok"]


@linux
@early
@in_all_modes_at_once
def test_idle_clients_cost_no_processor_time(mode, folder):
    with serve(mode, folder) as server, contextlib.ExitStack() as stack:
        for _ in range(30):
            assert stack.enter_context(server.peer()).hello()["ok"]
        before = server_cpu(server.process)
        time.sleep(0.5)
        assert server_cpu(server.process) - before < 0.1


def test_slices_are_the_smaller_the_more_clients_are_sent_something(tmp_path):
    service = ftp_server.Service("selectors", ftp_server.Storage(str(tmp_path), str(tmp_path)), 60, 1000)
    os.close(service.reserve)
    fill(tmp_path, {"x": b"123"})
    with listen() as listener, socket.create_connection(listener.getsockname()) as sock, \
            service.storage.open_download("x") as download:
        idle, busy = (service.welcome(sock, ("127.0.0.1", port)) for port in (1, 2))
        sending = busy.send_content(download, 0, 3, True)
        sending.send(None)
        assert service.senders == {busy} and service.slice() == ftp_server.TURN
        sending.close()
        assert not service.senders and service.sessions == {idle, busy}
    for count, size in ((4, ftp_server.TURN // 4), (10000, ftp_server.SLICE)):
        service.senders = set(range(count))
        assert service.slice() == size


CROWD = """
import selectors, socket, sys  # a process of its own: the test's shall measure nothing but the server
selector, buffer = selectors.DefaultSelector(), bytearray(1 << 18)
port, count, line, ahead = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3].encode() + b"\\n", sys.argv[4:] == ["ahead"]
for _ in range(count):
    sock = socket.create_connection(("127.0.0.1", port))
    sock.sendall(line)
    sock.setblocking(False)
    selector.register(sock, selectors.EVENT_READ | selectors.EVENT_WRITE * ahead, [0])
print(flush=True)
while True:
    for key, mask in selector.select():
        if mask & selectors.EVENT_READ and not key.fileobj.recv_into(buffer):
            sys.exit()
        if mask & selectors.EVENT_WRITE:  # more and more of them, whether there are answers or not
            key.data[0] += key.fileobj.send((line * 1000)[key.data[0] % len(line):])
"""


@posix
@cases("what", {"fetches": ["300", '{"cmd": "get", "name": "big", "verify": false}'],
                "asks": ["100", '{"cmd": "hello"}', "ahead"], "lists": ["100", '{"cmd": "ls", "path": "many"}', "ahead"]})
def test_crowd_that_comes_at_once_keeps_nobody_else_out(mode, tmp_path, what):
    with serve(mode, tmp_path, "-q") as server:
        sparse(os.path.join(server.download, "big"), 1024 * MIB)
        fill(server.download, {"many/%d" % number: b"" for number in range(99)})
        command = [sys.executable, "-c", CROWD, str(server.port)] + what
        with subprocess.Popen(command, stdout=subprocess.PIPE) as crowd:
            try:
                assert crowd.stdout.readline()
                for _ in range(3):
                    took = stopwatch(server, computes=True)
                    assert server.alive()
                    assert took() < 4  # seconds; it is behind them all. Threads that fight for Python took eight
                list_for(server, 1, computes=True)
            finally:
                crowd.kill()


# ==== Shutdown ======================================================================================================


@posix
@in_all_modes_at_once
def test_stop_ends_a_session_in_line_behind_one_whose_disk_hangs(mode, folder):
    faults, patch = Faults(folder), "import ftp_server; ftp_server.AT_ONCE[ftp_server.BLOCKS] = 1"
    with serve(mode, folder, patch=patch, faults=faults) as server, server.peer() as peer:
        with server.begin_upload("half", content(1000), 600, id=upload_id()):
            faults.arm("hold", ["fsync"])
            peer.send(put_header("whole", b"x"), b"x", {"sha256": None})
            wait_for(faults.struck)
            server.stop()
        assert re.search("put half 600 bytes .* failed: the server stops", server.log())
        faults.disarm()


@posix
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
@in_all_modes_at_once
def test_stop_cuts_what_is_under_way_and_it_can_be_resumed(mode, folder, how):
    data, identity = content(4 * MIB), upload_id()
    with serve(mode, folder) as server, contextlib.ExitStack() as stack:
        sparse(os.path.join(server.download, "big"), 16 * GIB)
        peers = [stack.enter_context(server.peer()) for _ in range(7)]  # the last says nothing
        peers[0].hello()
        peers[1].send(b'{"cmd":')
        peers[2].send({"cmd": "get", "name": "big"})
        assert peers[2].line()["ok"]
        peers[3].send("get|big|0")
        assert peers[3].read(3) == b"YES"
        peers[4].send("put|classic|1000")
        peers[5].send({"cmd": "get", "name": "big", "offset": 16 * GIB, "sha256": sha(b"")})
        stack.enter_context(server.begin_upload("x", data, 3 * MIB, id=identity))
        server.stop(how)
        assert server.uploads() == {}
        for peer in peers:
            peer.rest()
        lines = [[line for line in server.log().splitlines() if ":%d " % peer.sock.getsockname()[1] in line] for peer in peers]
        assert [len(lines[number]) for number in (0, 1, 6)] == [1, 1, 1]  # connected: who waits for nothing is not woken
        assert all(lines[number][-2].endswith("failed: the server stops") for number in (2, 3))
        kept = max(server.partials().values())
    with serve(mode, folder) as server:
        finish_upload(server, "x", data, identity, kept)


@posix
@in_all_modes_at_once
def test_ctrl_c_again_and_again_ends_it_no_worse(mode, folder):
    with serve(mode, folder) as server:
        deadline = time.monotonic() + 5
        while server.process.poll() is None and time.monotonic() < deadline:
            server.process.send_signal(signal.SIGINT)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.003)
        assert server.process.returncode == 0
        server.stopped = True
        server.check_log()


@posix
@early
@in_all_modes_at_once
def test_stop_does_not_wait_for_a_slow_disk(mode, folder):
    faults, data = Faults(folder), content(1000)
    with serve(mode, folder, faults=faults) as server, server.peer() as peer:
        faults.arm("hold", FLUSHING)
        peer.send(put_header("x", data), data, {"sha256": sha(data)})
        wait_for(faults.struck)
        server.stop()
        assert server.stored("x") is None


@in_all_modes_at_once
def test_port_is_free_again_at_once(mode, folder):
    with serve(mode, folder) as server, server.peer() as peer:
        assert peer.hello()["ok"]
        server.stop()
        with serve(mode, folder, port=server.port) as again:
            assert again.port == server.port and again.alive()


# ==== Classic: the article's own scripts ============================================================================

ARTICLE_CLIENT = r'''
import os, socket, sys  # what the article's client sends and receives, in the same pieces

sock = socket.socket()
sock.connect((sys.argv[1], int(sys.argv[2])))
while True:
    line = input(">>>").strip()
    if line == "exit()":
        break
    verb, path = line.split()
    name, size, sent = os.path.basename(path), os.path.getsize(path), 0
    sock.send(bytes("%s|%s|%s" % (verb, name, size), encoding="utf8"))
    if str(sock.recv(1024), encoding="utf8") == "OK":
        with open(path, "rb") as file:
            while size > sent:
                block = file.read(1024)
                sock.send(block)
                sent += len(block)
        print("sent", name)
'''

ARTICLE_SERVER = r'''
import os, selectors, socket  # what the article's server does, with all that it gets wrong

selector, states, received = selectors.DefaultSelector(), {}, 0

def accept(listener):
    conn = listener.accept()[0]
    conn.setblocking(False)
    selector.register(conn, selectors.EVENT_READ, read)
    states[conn] = {}

def read(conn):
    global states
    try:
        if not states[conn]:
            verb, name, size = str(conn.recv(1024), encoding="utf-8").split("|")
            states = {conn: {"verb": verb, "name": name, "size": int(size)}}
            if verb == "put":
                conn.send(bytes("OK", encoding="utf8"))
            if verb == "get":
                path = os.path.join("download", name)
                found = os.path.exists(path)
                answer = "%s|%s" % (("YES", os.path.getsize(path)) if found else ("NO", 0))
                conn.send(bytes(answer, encoding="utf8"))
        else:
            {"put": put, "get": get}[states[conn]["verb"]](conn)
    except Exception as error:
        print("error", error)
        selector.unregister(conn)
        conn.close()

def put(conn):
    global received
    data = conn.recv(1024)
    received += len(data)
    with open(os.path.join("upload", states[conn]["name"]), "ab") as file:
        file.write(data)
    if states[conn]["size"] == received:
        states[conn] = {}

def get(conn):
    if str(conn.recv(1024), "utf-8") == "second_active":
        with open(os.path.join("download", states[conn]["name"]), "rb") as file:
            for line in file:
                conn.send(line)
        states[conn] = {}

listener = socket.socket()
listener.bind(("127.0.0.1", 0))
listener.listen(5)
listener.setblocking(False)
selector.register(listener, selectors.EVENT_READ, accept)
print(listener.getsockname()[1], flush=True)
while True:
    for key, mask in selector.select():
        key.data(key.fileobj)
'''


def article_client(server, folder, files):
    """Put files with the article's client, one after the other on one connection."""
    fill(folder, files)
    commands = "".join("put %s\n" % name for name in files) + "exit()\n"
    done = run([sys.executable, "-c", ARTICLE_CLIENT, server.host, str(server.port)], folder, commands)
    assert done.code == 0 and done.out.count("sent") == len(files), done


@contextlib.contextmanager
def article_server(folder):
    """Run the article's server on folder/upload and folder/download; yield its port."""
    fill(folder, {"upload": None, "download": None})
    process = subprocess.Popen([sys.executable, "-c", ARTICLE_SERVER], cwd=str(folder), stdout=subprocess.PIPE,
                               env=ENVIRONMENT)
    with process:
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()


def test_article_client_puts_files_back_to_back(server, tmp_path):
    files = {unique(): content(size) for size in (0, 1, 1023, 1024, 1025, 100000, 0, 5)}
    article_client(server, tmp_path, files)
    wait_for(lambda: all(server.stored(name) == data for name, data in files.items()))


def test_many_article_clients_at_once(server, tmp_path):
    files = [{unique(): content(50000 + number), unique(): b"", unique(): content(number)} for number in range(10)]
    at_once(*[lambda mine=mine, number=number: article_client(server, tmp_path / str(number), mine)
              for number, mine in enumerate(files)])
    wait_for(lambda: all(server.stored(name) == data for mine in files for name, data in mine.items()))


def classic_get(peer, name, number="0"):
    """Get a file by the article's protocol; None if there is none."""
    peer.send("get|%s|%s" % (name, number))
    answer = b""
    while not re.match(rb"NO\|0|YES\|\d+$", answer):
        answer += peer.sock.recv(1024)
    if answer == b"NO|0":
        return None
    peer.send("second_active")
    return peer.read(int(answer[4:]))


CLASSIC_SIZES = [0, 1, 1023, 1024, 1025, CHUNKS[0] + 1, CHUNKS[1], MIB + 1]


@pytest.mark.parametrize("size", CLASSIC_SIZES)
def test_classic_get_brings_every_byte(server, peer, size):
    name, data = unique(), content(size)
    server.serves(name, data)
    assert classic_get(peer, name) == data
    assert classic_get(peer, name, "-%d" % size) == data


def test_classic_get_of_nothing_says_so_and_goes_on(server, peer):
    name = unique()
    assert classic_get(peer, name) is None
    server.serves(name, b"content")
    assert classic_get(peer, name) == b"content"


def test_classic_request_may_be_the_last_that_its_client_says(peer):
    peer.send("get|nothing|0")
    peer.sock.shutdown(socket.SHUT_WR)
    assert peer.rest() == b"NO|0"


@pytest.mark.parametrize("size", CLASSIC_SIZES)
def test_classic_put_stores_every_byte(server, peer, size):
    for name, data in ((unique(), content(size)), (unique(), content(size, 1))):
        peer.send("put|%s|%d" % (name, size))
        assert peer.read(2) == b"OK"
        peer.send(data)
        wait_for(lambda: server.stored(name) == data)


@in_all_modes_at_once
def test_classic_dialect_moves_files_that_were_written_a_moment_ago(mode, folder):
    (folder / "work").mkdir()
    with serve(mode, folder, patch="import ftp_server; ftp_server.FRESH = 60") as server:
        files = {"x%d" % size: content(size) for size in (0, 1, 2, 300001)}
        fill(folder / "work", files)
        for name, data in files.items():
            server.serves(name, data)
            with server.peer() as peer:
                assert classic_get(peer, name) == data
        patch = "import ftp_client; ftp_client.FRESH = 60"
        assert client(server, "put", *files, "--classic", cwd=folder / "work", patch=patch).code == 0
        wait_for(lambda: server.uploads() == files)


@early
@in_all_modes_at_once
def test_classic_request_is_complete_when_nothing_more_arrives_for_20_ms(mode, folder):
    assert ftp_server.QUIET_TIME == ftp_client.QUIET_TIME == 0.02  # seconds: too short for a test that shares its processor
    with serve(mode, folder, patch="import ftp_server; ftp_server.QUIET_TIME = 3") as server, server.peer() as peer:
        peer.send("put|x|1")
        time.sleep(0.2)
        peer.send("2")
        assert peer.read(2) == b"OK"
        peer.send(b"twelve bytes")
        wait_for(lambda: server.stored("x") == b"twelve bytes")


def test_classic_request_may_come_a_byte_at_a_time(server, peer):
    name = unique()
    peer.dribble("put|%s|9" % name)  # one digit: the first of two would be a size, too, if the other is late
    assert peer.read(2) == b"OK"
    peer.dribble("not eight")
    wait_for(lambda: server.stored(name) == b"not eight")
    server.serves(name, b"not eight")
    peer.dribble("get|%s|0" % name)
    assert peer.read(5) == b"YES|9"
    peer.dribble("second_active")
    assert peer.read(9) == b"not eight"


def test_both_dialects_may_be_spoken_on_one_connection(server, peer):
    name = unique()
    server.serves(name, b"content")
    for _ in range(2):
        assert peer.hello()["ok"]
        assert peer.get(name)[1] == classic_get(peer, name) == b"content"


@cases("patch", STAMPS)
@in_all_modes_at_once
def test_classic_get_of_a_file_that_changes_meanwhile_is_cut_off(mode, folder, patch):
    size = 32 * MIB
    with serve(mode, folder, patch=patch % "server") as server, server.peer() as peer:
        path = server.serves("x", b"1" * size)
        peer.send("get|x|0")
        assert peer.read(12) == b"YES|%d" % size
        peer.send("second_active")
        assert peer.read(1) == b"1"
        with open(path, "r+b") as file:
            file.write(b"2" * size)
        assert len(peer.rest()) == size - 2


def test_classic_put_overwrites_nothing(server, peer):
    name = unique("txt")
    for data in (b"one", b"two"):
        peer.send("put|%s|3" % name)
        assert peer.read(2) == b"OK"
        peer.send(data)
    wait_for(lambda: (server.stored(name), server.stored(name[:-4] + "-2.txt")) == (b"one", b"two"))


def test_cut_classic_put_leaves_nothing_visible(server, peer):
    name, before = unique(), set(server.partials())
    peer.send("put|%s|1000" % name)
    assert peer.read(2) == b"OK"
    peer.send(content(999))
    peer.sock.shutdown(socket.SHUT_WR)
    assert peer.closed()
    assert server.stored(name) is None
    wait_for(lambda: set(server.partials()) <= before)


@pytest.mark.parametrize("request_text", [
    "put|../x|1", "put|/etc/x|1", "put|a\\x|1", "put||1", "put|x|-1", "put|x|1.0", "put|x|1e3", "put|x| 1", "put|x|１",
    "put|x|9223372036854775808", "put|x|" + "9" * 5000, "put|x|0x10", "put|x|1|", "put|x|1\n", "put|.partial/x|1",
    "put|x\x1b[31m|1", "put|x|5hello", b"put|\xff|1", "get|x|one", "get|x|--1", "get|x|+1", "get|../outside/x|0",
    "get|/etc/passwd|0", "get|.partial|0", "get|.|0", "PUT|x|1", "exit|x|1", "__init__|x|1", "dir|x|1", "putx|1",
    "quit", "x" * 5000, "get|" + "x" * 70000], ids=lambda text: repr(text)[:24].replace("\\", "/"))
def test_bad_classic_request_is_refused(server, peer, request_text):
    server.serves("x", b"what no bad request gets")
    before, start = os.listdir(server.upload), time.monotonic()
    with contextlib.suppress(ConnectionError):
        peer.send(request_text)
    assert peer.rest_or_no() in (b"", b"NO|0")
    assert time.monotonic() - start < ftp_server.HEADER_TIME / 2
    assert os.listdir(server.upload) == before


@early
@in_all_modes_at_once
def test_second_word_of_a_classic_get_must_be_complete_in_time(mode, folder):
    with serve(mode, folder, patch="import ftp_server; ftp_server.HEADER_TIME = 2") as server, server.peer() as peer:
        server.serves("x", b"content")
        peer.send("get|x|0")
        assert peer.read(5) == b"YES|7"
        with contextlib.suppress(ConnectionError):
            peer.dribble("second_active", 0.5)
        assert peer.rest() == b""


def test_classic_get_needs_its_second_word(server, peer):
    name = unique()
    server.serves(name, b"content")
    peer.send("get|%s|0" % name)
    assert peer.read(5) == b"YES|7"
    peer.send("second_thoughts")
    assert peer.closed()


# ==== Discovery =====================================================================================================

DISCOVER = json.dumps({"cmd": "discover"}).encode("ascii").ljust(512)


@contextlib.contextmanager
def datagrams(server):
    """A UDP socket whose other end is the server's."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        sock.settimeout(0.5)
        sock.connect((server.host, server.port))
        yield sock
    finally:
        sock.close()


def discover(server, request=DISCOVER):
    """Ask until there is an answer, as a datagram may be lost; the first answer."""
    with datagrams(server) as sock:
        def answer():
            with contextlib.suppress(socket.timeout, ConnectionError):
                sock.send(request)
                return sock.recv(65536)
        return wait_for(answer)


def test_discovery_tells_who_and_where(server, mode):
    answer = json.loads(discover(server).decode("utf-8"))
    assert answer.pop("server") == "ftp_server"
    assert answer == {"ok": True, "host": socket.gethostname()[:64], "port": server.port, "mode": mode}


def test_discovery_request_may_be_longer(server):
    assert json.loads(discover(server, DISCOVER.ljust(1400)).decode("utf-8"))["port"] == server.port


@cases("name", {"long": "h" * 300, "Chinese": "教" * 64, "quotes": '"' * 64})
@in_all_modes_at_once
def test_discovery_answer_is_never_longer_than_the_request(mode, folder, name):
    patch = "import socket; socket.gethostname = lambda: %a" % name
    with serve(mode, folder, patch=patch) as server:
        answer = discover(server)
        assert len(answer) <= len(DISCOVER)
        assert json.loads(answer.decode("utf-8"))["host"][:9] == name[:9]


UNANSWERED = {
    "empty": b"",
    "one byte": b"{",
    "too short by a byte": DISCOVER[:511],
    "spaces": b" " * 512,
    "zeros": bytes(512),
    "cut": DISCOVER.replace(b"}", b" "),
    "other command": DISCOVER.replace(b"discover", b"hello   "),
    "upper case": DISCOVER.replace(b"discover", b"DISCOVER"),
    "no command": b"{}".ljust(512),
    "number": b'{"cmd": 1}'.ljust(512),
    "list": b'["discover"]'.ljust(512),
    "list as command": b'{"cmd": ["discover"]}'.ljust(512),
    "string": b'"discover"'.ljust(512),
    "classic": b"get|x|0".ljust(512),
    "two objects": (b'{"cmd": "discover"}' * 2).ljust(512),
    "byte order mark": b"\xef\xbb\xbf" + DISCOVER,
    "not UTF-8": b"\xff" + DISCOVER,
    "deep": b"[" * 8000,
    "many digits": b'{"cmd": "discover", "n": ' + b"9" * 8000 + b"}",
    "NaN": b'{"cmd": "discover", "n": NaN}'.ljust(512),
}


def test_datagrams_that_ask_for_nothing_get_nothing(server):
    with contextlib.ExitStack() as stack:
        sockets = {stack.enter_context(datagrams(server)): name for name in UNANSWERED}
        for sock, name in sockets.items():
            sock.send(UNANSWERED[name])
        discover(server)                        # the server is through with those before it, or nearly
        answered = select.select(list(sockets), [], [], 0.3)[0]
        assert [sockets[sock] for sock in answered] == []
    assert server.alive()


@in_all_modes_at_once
def test_at_most_fifty_answers_go_out_in_a_second(mode, folder):
    with serve(mode, folder) as server, datagrams(server) as sock:
        start, count = time.monotonic(), 1
        discover(server)
        for _ in range(40):
            for _ in range(5):
                sock.send(DISCOVER)
            while select.select([sock], [], [], 0.002)[0]:
                count += sock.recv(65536) != b""
        while select.select([sock], [], [], 0.3)[0]:
            count += sock.recv(65536) != b""
        assert 1 < count <= 50 * (1 + int(time.monotonic() - start))
        assert discover(server)                 # later there are answers again


@in_all_modes_at_once
def test_udp_port_that_is_taken_is_a_warning_only(mode, folder):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        with listen() as free:
            port = free.getsockname()[1]        # the TCP port of that number is to be had
        taken.bind(("127.0.0.1", port))
        with serve(mode, folder, port=port) as server:
            wait_for(lambda: "WARNING" in server.log())
            warning, = [line for line in server.log().split("\n") if "WARNING" in line]
            assert "UDP port %d" % port in warning
            assert server.alive()


@in_all_modes_at_once
def test_no_discovery_leaves_the_udp_port_alone(mode, folder):
    with serve(mode, folder, "--no-discovery") as server:
        assert server.alive()                   # so it is past the point where discovery would begin
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind((server.host, server.port))
        assert "WARNING" not in server.log()


@posix
@in_all_modes_at_once
def test_datagram_is_no_traceback_when_there_is_no_thread_to_be_had(mode, folder):
    faults = Faults(folder)
    with serve(mode, folder, faults=faults) as server, datagrams(server) as sock:
        discover(server)
        faults.arm("raise", ["thread"], last=10 ** 6)
        sock.send(DISCOVER)
        if mode == "socketserver":
            wait_for(faults.struck)
        faults.disarm()
        assert discover(server) and server.alive()


def find(port, folder, *more, seconds=0.3):
    assert ftp_client.FIND_TIME == 1  # seconds
    patch = "import ftp_client; ftp_client.FIND_TIME = %s" % seconds
    return run(launch(CLIENT, patch) + ["--find", "127.0.0.1", str(port)] + list(more), folder)


@early
@in_all_modes_at_once
def test_find_prints_a_command_that_works(mode, folder):
    with serve(mode, folder) as server:
        discover(server)
        done = find(server.port, folder, seconds=3)
        assert done.code == 0 and done.err == ""
        line, = done.out.splitlines()
        assert mode in line and socket.gethostname()[:20] in line
        command = re.search(r"python ftp_client\.py (\S+) (\d+)$", line)
        done = run(PYTHON + [CLIENT] + list(command.groups()) + ["ls"], folder)
        assert done.code == 0, done


def test_find_without_an_address_asks_the_broadcast_address(work):
    patch = """
import ftp_client, socket
ftp_client.FIND_TIME = 0.1
class Shown(socket.socket):
    def sendto(self, data, address):  # nothing leaves
        print(*address, self.getsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST) > 0)
socket.socket = Shown
"""
    done = run(launch(CLIENT, patch) + ["--find"], work)
    assert (done.code, done.out) == (1, "255.255.255.255 8885 True\n")


def test_find_that_nobody_answers_is_one_line_and_exit_1(work):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as mute:
        mute.bind(("127.0.0.1", 0))
        done = find(mute.getsockname()[1], work)
    assert (done.code, done.out, done.err.count("\n")) == (1, "", 1), done


def test_find_of_an_unknown_host_is_one_line_and_exit_1(work):
    done = run(PYTHON + [CLIENT, "--find", "no.such.host.invalid"], work)
    assert (done.code, done.out, done.err.count("\n")) == (1, "", 1), done


@contextlib.contextmanager
def fake_discovery(*answers):
    """Answer one datagram by all the given ones; yield the port and the list of requests."""
    requests = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.settimeout(PATIENCE)

        def answer():
            with contextlib.suppress(OSError):
                request, sender = sock.recvfrom(65536)
                requests.append(request)
                for data in answers:
                    sock.sendto(wire(data), sender)

        thread = threading.Thread(target=answer)
        thread.start()
        yield sock.getsockname()[1], requests
        thread.join(PATIENCE)


def found(**more):
    return dict({"ok": True, "server": "ftp_server", "host": "desk", "port": 8885, "mode": "selectors"}, **more)


@early
def test_find_asks_as_the_protocol_says(work):
    with fake_discovery(found()) as (port, requests):
        assert find(port, work, seconds=3).code == 0
    request, = requests
    assert len(request) >= 512 and request[request.index(b"}") + 1:].strip() == b""
    assert json.loads(request.decode("ascii")) == {"cmd": "discover"}


@posix
def test_ctrl_c_ends_find_with_130():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.settimeout(PATIENCE)
        # A signal that comes right before a call that waits is seen only behind it: none may wait for as long as we do.
        command = launch(CLIENT, "import ftp_client; ftp_client.FIND_TIME = %d" % (PATIENCE / 2))
        command += ["--find", "127.0.0.1", str(sock.getsockname()[1])]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT) as process:
            sock.recvfrom(1000)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130 and b"Traceback" not in err


@early
def test_hostile_answers_to_find_are_escaped_and_never_acted_on(work):
    with listen() as trap:
        port = trap.getsockname()[1]
        names = ["\x1b[2J\x07red", "two\nlines\r", "\u202eback", "\udcff\x9b1m", "h" * 5000]
        with fake_discovery(*[found(host=name, mode=name, port=port) for name in names]) as (udp, _):
            done = find(udp, work, seconds=3)           # run() looks for raw control characters
        assert done.code == 0 and done.err == ""
        assert len(done.out.splitlines()) == len(names)
        assert "\\x1b[2J" in done.out and "\u202e" not in done.out
        assert max(map(len, done.out.splitlines())) < 1000
        assert select.select([trap], [], [], 0)[0] == []        # nobody called at the port that they name
    assert os.listdir(str(work)) == []


def test_answers_to_find_that_are_none_are_not_shown(work):
    bad = [b"", b"\xff", b"{", b"[]", b"[" * 60000, b'{"ok":' + b"9" * 60000 + b"}", {"ok": True}, found(ok=False), found(ok=1),
           found(port="8885"), found(port=0), found(port=65536), found(port=True), found(port=8885.0), found(host=7),
           found(host=None), found(mode=["selectors"])]
    with fake_discovery(*bad) as (port, _):
        done = find(port, work)
    assert (done.code, done.out, done.err.count("\n")) == (1, "", 1), done


# ==== Explain =======================================================================================================

LINE = re.compile(r"explain: (link loop|communication loop|event loop|callback)\s+(\w+)\.(\w+)\b(.*)")


def explained(server):
    """What --explain has shown so far: (loop, class, method, the rest) for each line of that form."""
    return [match.groups() for match in map(LINE.match, server.log().split("\n")) if match]


def shows(steps, *wanted):
    """Fail unless the wanted (loop, pattern of the class, method) stand among the steps, in this order."""
    rest = iter(steps)
    for loop, kind, method in wanted:
        assert any(step[0] == loop and re.match("(%s)$" % kind, step[1]) and step[2] == method for step in rest), \
            "%s.%s (%s) is not shown, or too early" % (kind, method, loop)


SETUP = [("link loop", kind, method) for kind, method in (
    ("ThreadFtpServer", "__init__"), ("TCPServer", "__init__"), ("BaseServer", "__init__"), ("Stoppable", "server_bind"),
    ("TCPServer", "server_bind"), ("TCPServer", "server_activate"), ("Stoppable", "serve_forever"), ("BaseServer", "serve_forever"))]
LINK = [("link loop", kind, method) for kind, method in (
    ("BaseServer", "_handle_request_noblock"), ("ThreadFtpServer", "get_request"), ("ThreadFtpServer|Stoppable", "process_request"),
    ("ThreadingMixIn", "process_request"), ("ThreadingMixIn", "process_request_thread"))]
COMMUNICATION = [("communication loop", kind, method) for kind, method in (
    ("BaseServer", "finish_request"), ("BaseRequestHandler", "__init__"), ("BaseRequestHandler", "setup"), ("FtpHandler", "handle"),
    ("BaseRequestHandler", "finish"))]
CLOSING = ("link loop", "TCPServer", "shutdown_request")


def explaining(mode, folder, *options, **how):
    return serve(mode, folder, "--explain", *options, **how)


def test_explain_shows_the_real_lookup_order(tmp_path):
    with explaining("socketserver", tmp_path) as server:
        orders = re.findall("lookup order: (.*)", server.log())
    for kind in (ftp_server.ThreadFtpServer, ftp_server.DiscoveryServer):
        assert " -> ".join(parent.__name__ for parent in kind.__mro__) in orders
    assert "ThreadingTCPServer -> ThreadingMixIn -> TCPServer -> BaseServer" in orders[0]
    assert "ThreadingUDPServer -> ThreadingMixIn -> UDPServer -> TCPServer -> BaseServer" in orders[1]


def test_explain_shows_both_loops_in_their_order(tmp_path):
    with explaining("socketserver", tmp_path, "--no-discovery") as server:
        with server.peer() as peer:
            peer.hello()
        wait_for(lambda: "shutdown_request" in server.log())
        steps = explained(server)
    shows(steps, *SETUP)
    shows(steps, *LINK)
    shows(steps, *(COMMUNICATION + [CLOSING]))
    handler, = [rest for _, kind, method, rest in steps if (kind, method) == ("FtpHandler", "handle")]
    assert "socket" in handler and "raddr" in handler


def test_explain_names_the_class_where_python_found_each_method(tmp_path):
    with explaining("socketserver", tmp_path) as server:
        server.alive(), discover(server)
        wait_for(lambda: server.log().count(".shutdown_request") >= 2)
        steps = explained(server)
    assert len(steps) > 30
    for _, kind, method, rest in steps:
        found_in = getattr(ftp_server, kind, None) or getattr(ftp_server.socketserver, kind)
        assert method in vars(found_in), "%s has no %s of its own" % (kind, method)
        told = re.search(r"[a-z]{3}", rest.split(":", 1)[1])
        assert told or not ftp_server.socketserver.TCPServer.__doc__, "not a word on what it is for: " + method     # python -OO


def test_explain_shows_a_class_that_it_has_never_heard_of(tmp_path):
    patch = """
import ftp_server
class Mine(ftp_server.ThreadFtpServer):
    def verify_request(self, request, client_address):
        return super().verify_request(request, client_address)
ftp_server.MODES["socketserver"] = Mine
"""
    with explaining("socketserver", tmp_path, patch=patch) as server:
        server.alive()
        steps = wait_for(lambda: [step for step in explained(server) if step[2] == "process_request"] and explained(server))
    assert "lookup order: Mine -> ThreadFtpServer -> " in server.log()
    shows(steps, ("link loop", "Mine", "verify_request"), ("link loop", "BaseServer", "verify_request"))


def test_explain_shows_the_pair_that_a_request_is_over_udp(tmp_path):
    with explaining("socketserver", tmp_path) as server:
        discover(server)
        wait_for(lambda: "UDPServer.shutdown_request" in server.log())
        steps = explained(server)
    shows(steps, ("link loop", "DiscoveryServer", "__init__"), ("link loop", "UDPServer", "server_activate"),
          ("link loop", "UDPServer", "get_request"), ("link loop", "ThreadingMixIn", "process_request"),
          ("link loop", "ThreadingMixIn", "process_request_thread"), ("communication loop", "BaseServer", "finish_request"),
          ("communication loop", "DiscoveryHandler", "handle"), ("link loop", "UDPServer", "shutdown_request"))
    pair = next(rest for _, kind, _, rest in steps if kind == "DiscoveryHandler")
    assert re.search(r"\(b'\{\"cmd\": \"discover\"\}.*', <socket\.socket .*laddr=\('127\.0\.0\.1', %d\)" % server.port, pair), pair


def test_explain_shows_the_event_loop(tmp_path):
    with explaining("selectors", tmp_path) as server:
        server.serves("x", b"x")
        with server.peer() as peer:
            assert peer.get("x")[2]["ok"]
        wait_for(lambda: ".unregister" in server.log())
        steps = explained(server)
    names = [(method, re.search(r"\w+", rest.split(":", 1)[0])) for _, _, method, rest in steps if method == "register"]
    registered = [callback.group() for _, callback in names if callback]
    assert registered[0] == "accept" and {"discover", "resume"} <= set(registered)
    shows(steps, ("event loop", r"\w*Selector", "register"), ("event loop", r"\w*Selector", "select"),
          ("callback", "SelectFtpServer", "accept"), ("event loop", r"\w*Selector", "register"),
          ("callback", "SelectFtpServer", "resume"), ("event loop", r"\w*Selector", "unregister"))
    assert "lookup order" not in server.log()


def test_explain_shows_the_callback_of_discovery(tmp_path):
    with explaining("selectors", tmp_path) as server:
        discover(server)
        shows(explained(server), ("event loop", r"\w*Selector", "register"), ("callback", "SelectFtpServer", "discover"))


def test_explain_writes_whole_lines_whoever_writes_with_it(tmp_path):
    with explaining("socketserver", tmp_path) as server:
        at_once(*[lambda: [server.alive() for _ in range(10)] for _ in range(20)])
        wait_for(lambda: server.log().count(".close_request") >= 200)
    lines = server.log().rstrip("\n").split("\n")
    assert len(lines) > 2000
    assert [line for line in lines if not re.match(r"explain: (?!.*explain: )|\d{4}-(?!.*explain: )", line)] == []


@in_all_modes_at_once
def test_explain_goes_to_stderr_and_only_when_asked(mode, folder):
    with explaining(mode, folder) as server:
        assert server.alive()
        wait_for(lambda: explained(server))
    assert "explain:" not in server.out()
    hookless = "import sys, threading; sys.setprofile = threading.setprofile = None"     # to call them would end the process
    with serve(mode, folder, patch=hookless) as server:
        assert server.alive() and discover(server)
    assert "explain:" not in server.out() + server.log()


def test_explaining_server_works_as_ever(mode, tmp_path, work):
    data = content(MIB)
    with explaining(mode, tmp_path) as server:
        fill(work, {"a.bin": data})
        server.serves("b.bin", data)
        assert client(server, "put", "a.bin", cwd=work).code == 0
        assert client(server, "get", "b.bin", cwd=work).code == 0
        assert server.uploads() == {"a.bin": data}
    assert tree(work) == {"a.bin": data, "b.bin": data}


def messages(done, arrow):
    """What a client has explained to cross the wire in one direction: dictionaries, other text as it is."""
    texts = [line[3:] for line in done.err.splitlines() if line.startswith(arrow + " ")]
    return [json.JSONDecoder().raw_decode(text)[0] if text.startswith("{") else text for text in texts]


def test_explaining_client_shows_what_it_really_sends(work):
    sent = []

    def put(peer, header):
        sent.extend([header, "%d bytes" % len(peer.read(header["size"])), peer.line()])
        peer.send({"ok": True, "name": header["name"], "size": header["size"], "sha256": sent[-1]["sha256"], "duplicate": False})

    def get(peer, header):
        sent.append(header)
        peer.send({"ok": True, "size": 5, "offset": 0, "mtime": 1}, b"12345", {"ok": True, "sha256": sha(b"12345")})

    def ls(peer, header):
        sent.append(header)
        peer.send({"ok": True, "size": 0})

    fill(work, {"a": b"secret\n-> {}"})
    with fake_server(put=put, get=get, ls=ls) as (port, headers):
        done = client(port, "--explain", cwd=work, given="put a\nget b\nls\nexit()\n")
        hello = headers[0]
    assert messages(done, "->") == [hello] + sent
    assert [message for message in messages(done, "<-")[1:]] == [
        {"ok": True, "name": "a", "size": 12, "sha256": sha(b"secret\n-> {}"), "duplicate": False},
        {"ok": True, "size": 5, "offset": 0, "mtime": 1}, "5 bytes", {"ok": True, "sha256": sha(b"12345")},
        {"ok": True, "size": 0}, "0 bytes"]
    assert "secret" not in done.err + done.out


@cases("answer, shown", {"no JSON": ("\xe9\x1b[2J", "\xe9\\x1b[2J"), "no UTF-8": (b"\xff", "\ufffd"), "no answer": ("[1, 2]", "[1, 2]")})
def test_explaining_client_shows_nonsense_as_it_came(work, answer, shown):
    def get(peer, header):
        peer.send(answer, b"\r\n")

    with fake_server(get=get) as (port, headers):
        done = client(port, "--explain", "get", "x", cwd=work)
    assert done.code == 1 and messages(done, "<-")[-1] == shown


def test_explaining_client_shows_resume_mkdir_and_refusals(server, work):
    name, folder = unique(), unique("d")
    fill(work, {name: content(MIB), folder: None})
    done = client(server, "put", "-r", name, folder, "--explain", cwd=work)
    assert done.code == 0
    sent = messages(done, "->")
    assert [message["cmd"] for message in sent if isinstance(message, dict) and "cmd" in message] == ["hello", "resume", "put", "mkdir"]
    assert "%d bytes" % MIB in sent
    done = client(server, "get", "nothing", "--explain", cwd=work)
    assert done.code == 1 and messages(done, "<-")[-1]["code"] == "not-found"


def test_explaining_client_shows_the_classic_dialect(server, work):
    name = unique("txt")
    fill(work, {name: b"four"})
    server.serves(name, b"hello\n")
    done = client(server, "put", name, "--classic", "--explain", cwd=work)
    assert done.code == 0
    assert (messages(done, "->"), messages(done, "<-")) == (["put|%s|4" % name, "4 bytes"], ["OK"])
    done = client(server, "get", name, "-f", "--classic", "--explain", cwd=work)
    assert done.code == 0
    assert (messages(done, "->"), messages(done, "<-")) == (["get|%s|0" % name, "second_active"], ["YES|6", "6 bytes"])
    done = client(server, "get", "nothing", "--classic", "--explain", cwd=work)
    assert (messages(done, "->"), messages(done, "<-")) == (["get|nothing|0"], ["NO|0"])


@early
def test_explaining_find_shows_both_datagrams(work):
    with fake_discovery(found(host="\x1b[2J")) as (port, _):
        done = find(port, work, "--explain", seconds=3)
    assert messages(done, "->")[0] == {"cmd": "discover"}
    assert messages(done, "<-")[0] == found(host="\x1b[2J")


def test_client_that_need_not_explain_is_quiet(server, work):
    name = unique()
    fill(work, {name: b"x"})
    plain, told = (client(server, "put", name, *more, cwd=work) for more in ([], ["--explain"]))
    assert plain.code == told.code == 0 and plain.err == "" and told.err
    assert told.out.replace("already there", "stored") == plain.out


# ==== Command line: the server ======================================================================================


@in_all_modes_at_once
def test_banner_names_the_folders_and_what_to_type(mode, folder):
    with serve(mode, folder) as server:
        pass
    lines = server.out().splitlines()
    assert lines[0] == "listening on 127.0.0.1:%d (%s)" % (server.port, mode)
    rest = "\n".join(lines[1:])
    assert server.upload in rest and server.download in rest
    assert re.search(r"ftp_client\.py 127\.0\.0\.1 %d" % server.port, rest)


def has_ipv6():
    """Tell whether this machine has ::1."""
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
            return True
    except OSError:
        return False


HAS_IPV6 = has_ipv6()


@pytest.mark.skipif(not HAS_IPV6, reason="this machine has no ::1")
def test_server_on_ipv6(mode, tmp_path, work):
    with serve(mode, tmp_path, host="::1") as server:
        assert server.out().startswith("listening on [::1]:%d (" % server.port)
        (work / "x").write_bytes(b"over IPv6")
        assert client(server, "put", "x", cwd=work).code == 0
        assert server.uploads() == {"x": b"over IPv6"}
        assert run(launch(CLIENT) + ["[::1]", str(server.port), "ls"], work).code == 0
        found = run(launch(CLIENT) + ["--find", "[::1]", str(server.port)], work)
        assert found.code == 0 and "ftp_client.py ::1 %d\n" % server.port in found.out


ANY_ADDRESS = """
import socket, weakref  # what is bound to 0.0.0.0 is bound to 127.0.0.1 in truth, :: to ::1: no test listens to the network
real_bind, real_name, everywhere = socket.socket.bind, socket.socket.getsockname, weakref.WeakKeyDictionary()
def bind(sock, address):
    loopback = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address[0])
    if loopback == "::1" and sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
        raise OSError("for IPv6 only")
    real_bind(sock, (loopback or address[0],) + address[1:])
    if loopback:
        everywhere[sock] = address[0]
def getsockname(sock):
    name = real_name(sock)
    return (everywhere.get(sock, name[0]),) + name[1:]
def create(sock, *args, **kwargs):
    real_init(sock, *args, **kwargs)
    if sock.family == socket.AF_INET6 and not args[3:] and not kwargs.get("fileno"):
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # as on some systems
real_init, socket.socket.__init__ = socket.socket.__init__, create
socket.socket.bind, socket.socket.getsockname = bind, getsockname
"""


@at_once_for({"%s, %s" % pair: pair for pair in itertools.product(["0.0.0.0", "::"][:1 + HAS_IPV6], ftp_server.MODES)})
def test_server_for_the_network_says_who_can_reach_it(pair, folder):
    host, mode = pair
    with serve(mode, folder / "network", host=host, patch=ANY_ADDRESS) as server:
        wait_for(lambda: "no password" in server.out())
    with serve(mode, folder / "loopback") as loopback:
        wait_for(lambda: "ftp_client.py" in loopback.out())
    more = len((server.out() + server.log()).splitlines()) - len((loopback.out() + loopback.log()).splitlines())
    assert more >= 1 and re.search("reach|network|anyone|everyone", server.out() + server.log())
    assert "ftp_client.py %s " % host not in server.out() and "WARNING" not in server.log(), server.log()


def test_banner_of_a_machine_without_a_network_sends_nobody_to_another(tmp_path):
    patch = ANY_ADDRESS + "import ftp_server; ftp_server.own_addresses = lambda family: ['127.0.0.1']"
    with serve("selectors", tmp_path, host="0.0.0.0", patch=patch) as server:
        wait_for(lambda: "  on this machine:  python ftp_client.py 127.0.0.1 %d\n" % server.port in server.out())
    assert "the other machine" not in server.out()


NO_NAMES = ANY_ADDRESS + """
import time
def look_up(host, *args, real=socket.getaddrinfo, **more):
    if host == socket.gethostname():
        time.sleep(60)
    return real(host, *args, **more)
socket.getaddrinfo = look_up
"""


@in_all_modes_at_once
def test_name_server_that_is_silent_keeps_nobody_waiting(mode, folder):
    with serve(mode, folder, host="0.0.0.0", patch=NO_NAMES) as server, server.peer() as peer:
        assert peer.hello()["ok"]
        assert "python ftp_client.py" in server.out()
    assert ftp_server.LOOK_UP_TIME <= 1  # seconds


def test_own_addresses_are_those_of_the_name_server_if_it_answers_in_time(monkeypatch):
    def look_up(*args, **more):
        time.sleep(0.1)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("198.51.100.7", 0))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(ftp_server, "LOOK_UP_TIME", PATIENCE)
    assert "198.51.100.7" in ftp_server.own_addresses(socket.AF_INET)
    monkeypatch.setattr(threading.Thread, "start", mock.Mock(side_effect=RuntimeError))
    assert ftp_server.own_addresses(socket.AF_INET)  # without a thread, the others


@posix
@in_all_modes_at_once
def test_upload_folder_that_is_gone_is_said_to_be_the_servers(mode, folder):
    with serve(mode, folder) as server, server.peer() as peer:
        os.rmdir(os.path.join(server.upload, ".partial"))
        os.rmdir(server.upload)
        for answer in (peer.put("x", b"123"), peer.ask({"cmd": "mkdir", "name": "d"})):
            assert (answer["code"], answer["error"]) == ("server-error", "the server's upload folder is gone")
        os.mkdir(server.upload)
        assert peer.put("x", b"123")["ok"] and server.uploads() == {"x": b"123"}


def test_sweep_of_a_folder_that_is_gone_is_refused(tmp_path):
    with pytest.raises(ftp_server.Refusal):
        ftp_server.Storage(str(tmp_path / "gone"), str(tmp_path)).sweep()


def server_fails(*arguments, patch=""):
    """Run a server that can't start; return its exit code and the one line that it says."""
    done = run(launch(SERVER, patch) + list(arguments), HERE)
    assert done.out == "" and done.err
    return done.code, done.err


@in_all_modes_at_once
def test_port_in_use_is_one_clear_line(mode, folder):
    with listen() as sock:
        port = sock.getsockname()[1]
        code, line = server_fails("127.0.0.1", str(port), "--mode", mode, "--root", str(folder))
    assert code == 1 and line.count("\n") == 1 and str(port) in line


@in_all_modes_at_once
def test_port_without_the_right_is_one_clear_line(mode, folder):
    deny = ("import socket\ndef bind(sock, address): raise PermissionError(13, 'Permission denied')\n"
            "socket.socket.bind = bind")
    code, line = server_fails("127.0.0.1", "80", "--mode", mode, "--root", str(folder), patch=deny)
    assert code == 1 and line.count("\n") == 1 and "80" in line


@at_once_for({option: option for option in ("--root", "--upload", "--download")})
def test_folder_that_is_none_is_one_clear_line(option, folder):
    (folder / "file").write_bytes(b"")
    for what in ("missing", "file"):
        code, line = server_fails("127.0.0.1", "0", "--root", str(folder), option, str(folder / what))
        assert code == 1 and line.count("\n") == 1 and what in line


def test_what_can_not_be_written_at_the_start_is_one_clear_line(tmp_path):
    fill(tmp_path, {"upload/.partial": b"a file, no folder"})
    for more, what in ((["--log-file", str(tmp_path / "missing" / "log")], "missing"), ([], "upload")):
        code, line = server_fails("127.0.0.1", "0", "--root", str(tmp_path), *more)
        assert code == 1 and line.count("\n") == 1 and what in line


@at_once_for({
    "mode": ["--mode", "forking"], "size": ["--max-size", "10Q"], "size -1": ["--max-size", "-1"],
    "port": ["127.0.0.1", "http"], "port 65536": ["127.0.0.1", "65536"], "port -1": ["127.0.0.1", "-1"],
    "timeout 1e9": ["--timeout", "1e9"],
    "timeout": ["--timeout", "soon"], "timeout 0": ["--timeout", "0"], "timeout nan": ["--timeout", "nan"],
    "clients": ["--max-clients", "some"], "clients -1": ["--max-clients", "-1"], "option": ["--frob"],
    "too much": ["127.0.0.1", "0", "more"], "port first": ["8885"], "host:port": ["127.0.0.1:8885"], "[host]:port": ["[::1]:8885"],
})
def test_wrong_usage_of_the_server_is_exit_2(arguments, folder):
    assert server_fails("--root", str(folder), *arguments)[0] == 2


@pytest.mark.parametrize("text, size", [("500", 500), ("64K", 65536), ("10M", 10 * MIB), ("2G", 2 * GIB)])
def test_sizes_count_in_1024s(tmp_path, text, size):
    with serve("selectors", tmp_path, "--max-size", text) as server, server.peer() as peer:
        assert peer.hello()["max_size"] == size


@in_all_modes_at_once
def test_folders_can_be_named_apart(mode, folder):
    for name in ("here", "there"):
        (folder / name).mkdir()
    (folder / "there" / "y").write_bytes(b"y")
    with serve(mode, folder, "--upload", str(folder / "here"), "--download", str(folder / "there")) as server:
        with server.peer() as peer:
            assert peer.put("x", b"x")["ok"] and peer.get("y")[1] == b"y"
    assert tree(folder / "here") == {"x": b"x"}


@posix
@in_all_modes_at_once
def test_log_tells_every_transfer_in_one_escaped_line(mode, folder):
    with serve(mode, folder) as server, server.peer() as peer:
        server.serves("成绩.txt", b"12345")
        peer.put("in/upload 1.txt", b"123")
        peer.put("in/upload 1.txt", b"456")
        peer.get("成绩.txt")
        peer.get("bad\x1b[31m\nname")
        peer.send("get|classic\x1b[31m|0")
        peer.rest_or_no()
        assert classic_get(peer, "成绩.txt") == b"12345"
        peer.send("put|in/upload 1.txt|3")
        assert peer.read(2) == b"OK"
        peer.send(b"123")
        wait_for(lambda: server.log().count(" ok") == 5)
        server.stop()
        lines = server.log().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d", line) for line in lines)
    found = [re.search(r"127\.0\.0\.1:\d+ (.*) bytes \d+\.\d+ s \d+\.\d+ MB/s (.*)$", line) for line in lines]
    put, get = "put in/upload 1.txt 3", "get 成绩.txt 5"
    assert [match.groups() for match in found if match] == [
        (put, "ok"), (put, "ok, stored as upload 1-2.txt"), (get, "ok"), (get, "ok"),
        (put, "ok, already there as upload 1.txt")]
    assert "\x1b" not in server.log()


@in_all_modes_at_once
def test_log_tells_a_failed_transfer_once(mode, folder):
    with serve(mode, folder) as server, server.peer() as peer:
        assert peer.ask(put_header("x", b"123"), b"123", {"sha256": sha(b"other")})["code"] == "mismatch"
        assert peer.ask({"cmd": "get", "name": "none"})["code"] == "not-found"
        server.stop()
        assert [re.search("(put x|get none).*(failed|refused)", line).groups()
                for line in server.log().splitlines() if "WARNING" in line] == [("put x", "failed"), ("get none", "refused")]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@in_all_modes_at_once
def test_name_that_the_terminal_lacks_never_raises(mode, folder, encoding):
    with serve(mode, folder, "-v", environment={"PYTHONIOENCODING": encoding}) as server, server.peer() as peer:
        assert peer.put("成绩 🎓.txt", b"x")["ok"]
        assert peer.get("成绩 🎓.txt")[0]["code"] == "not-found"
        assert server.uploads() == {"成绩 🎓.txt": b"x"}


@in_all_modes_at_once
def test_quiet_server_logs_nothing_of_transfers_and_a_log_file_all(mode, folder):
    log_file = folder / "log.txt"
    with serve(mode, folder, "-q") as server, server.peer() as peer:
        assert peer.put("a-name", b"x")["ok"]
    assert "a-name" not in server.log()
    with serve(mode, folder, "--log-file", str(log_file)) as server, server.peer() as peer:
        assert peer.put("a-name", b"x")["ok"]
    assert b"a-name" in log_file.read_bytes()


@pytest.mark.parametrize("script", [SERVER, CLIENT], ids=["server", "client"])
def test_version_and_help(script, tmp_path):
    done = run(PYTHON + [script, "--version"], tmp_path)
    assert done.code == 0 and re.search(r"\d+\.\d+", done.out)
    done = run(PYTHON + [script, "--help"], tmp_path)
    assert done.code == 0 and "--timeout" in done.out


@in_all_modes_at_once
def test_each_script_runs_alone_with_the_bare_interpreter(mode, folder):
    """The main job on a machine with nothing but Python: each script by itself in a folder, both ways."""
    there, here = folder / "there", folder / "here"
    there.mkdir(), here.mkdir()
    shutil.copy(SERVER, str(there))
    shutil.copy(CLIENT, str(here))
    bare = [sys.executable, "-I", "-S", "-W", "error"]
    with open(str(folder / "out"), "wb") as out:
        process = subprocess.Popen(bare + ["ftp_server.py", "127.0.0.1", "0", "--mode", mode], cwd=str(there),
                                   stdout=out, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    try:
        banner = wait_for(lambda: re.match(rb"listening on 127\.0\.0\.1:(\d+) ", read_bytes(folder / "out")))
        port = banner.group(1).decode()
        (here / "up.txt").write_bytes(b"up")
        (there / "download" / "down.txt").write_bytes(b"down")
        done = run(bare + ["ftp_client.py", "127.0.0.1", port], here, "put up.txt\nget down.txt\nexit()\n")
        assert done.code == 0
        assert (there / "upload" / "up.txt").read_bytes() == b"up"
        assert (here / "down.txt").read_bytes() == b"down"
        process.terminate()
        assert process.wait(ftp_server.STOP_TIME + 3) == 0 or os.name != "posix"
    finally:
        process.kill()
        process.wait(PATIENCE)
    assert sorted(os.listdir(str(there))) == ["download", "ftp_server.py", "upload"]


# ==== Command line: the client, one command =========================================================================


@pytest.fixture
def work(tmp_path):
    """The folder that the client works in."""
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def lone_shared(tmp_path_factory):
    with serve("selectors", tmp_path_factory.mktemp("lone")) as server:
        yield server


@pytest.fixture
def lone(lone_shared):
    """A server of one mode with empty folders, for tests of what the client does by itself."""
    for folder in (lone_shared.upload, lone_shared.download):
        for name in os.listdir(folder):
            if name != ".partial":
                path = os.path.join(folder, name)
                shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)
    return lone_shared


def client(server, *arguments, cwd, given="", patch="", faults=None, environment=()):
    """Run the client against a server (or a port of 127.0.0.1) to its end."""
    host, port = ("127.0.0.1", server) if isinstance(server, int) else (server.host, server.port)
    environment = dict(environment, **faults.environment if faults else {})
    patch = FAULTS + patch if faults else patch
    return run(launch(CLIENT, patch) + [host, str(port)] + list(arguments), cwd, given, environment=environment)


TREE = {"t": None, "t/a.txt": b"a", "t/empty file": b"", "t/empty folder": None, "t/sub": None,
        "t/sub/成绩.txt": b"b" * 70000, "t/sub/deep": None, "t/sub/deep/c": b"c"}


def test_client_puts_and_gets_in_both_modes(server, work):
    name, data = unique(), content(3 * MIB)
    fill(work, {name: data})
    os.utime(str(work / name), ns=(0, 1234567890325739463))        # a float has room for a part of these digits
    done = client(server, "put", name, cwd=work)
    assert done.code == 0 and name in done.out
    assert server.stored(name) == data
    assert modified(os.path.join(server.upload, name)) == modified(work / name)
    down = unique()
    os.utime(server.serves(down, data), ns=(0, 1234567890325739463))
    done = client(server, "get", down, cwd=work)
    assert done.code == 0 and down in done.out
    assert tree(work, hidden=True) == {name: data, down: data}
    assert modified(work / down) == modified(work / name)


@pytest.mark.parametrize("options", [[], ["--no-verify"]], ids=["verified", "not verified"])
def test_client_moves_any_size(lone, work, options):
    up, down = ({way + str(size): content(size) for size in SIZES} for way in ("up", "down"))
    fill(work, up)
    fill(lone.download, down)
    typed = ["put " + name for name in up] + ["get " + name for name in down]
    assert client(lone, *options, cwd=work, given="\n".join(typed)).code == 0
    assert lone.uploads() == up
    assert tree(work, hidden=True) == dict(up, **down)


def test_several_files_go_on_after_a_failure_and_the_summary_names_it(lone, work):
    fill(work, {"a": b"a", "b": b"b"})
    done = client(lone, "put", "a", "missing", "b", "lost*", cwd=work)
    assert done.code == 1
    assert done.err.splitlines()[-1].startswith("2 of 4 done") and done.err.endswith("; failed: missing, lost*\n")
    assert lone.uploads() == {"a": b"a", "b": b"b"}
    lone.serves("c", b"c")
    lone.serves("d", b"d")
    done = client(lone, "get", "c", "nowhere", "d", "../c", "none*", cwd=work)
    assert done.code == 1 and done.err.splitlines()[-1].startswith("2 of 5 done")
    assert done.err.endswith("; failed: ../c, none*, nowhere\n")
    assert tree(work, hidden=True) == {"a": b"a", "b": b"b", "c": b"c", "d": b"d"}


def test_empty_name_is_no_name(lone, work):
    lone.serves("x", b"x")
    for arguments in (["get", ""], ["get", "-r", ""], ["ls", ""], ["put", ""]):
        done = client(lone, *arguments, cwd=work)
        assert done.code == 1 and done.err.count("\n") == 1
    assert tree(work) == {} and lone.uploads() == {}


def test_wildcards_are_expanded_by_the_client(lone, work):
    fill(work, {"a.txt": b"a", "b.txt": b"b", "c.bin": b"c"})
    assert client(lone, "put", "*.txt", cwd=work).code == 0
    assert set(lone.uploads()) == {"a.txt", "b.txt"}
    fill(lone.download, {"x1": b"1", "x2": b"2", "y": b"y", "d/x3": b"3"})
    assert client(lone, "get", "x?", "d/x*", cwd=work).code == 0
    assert {name for name in tree(work) if name[0] in "xyd"} == {"x1", "x2", "x3"}
    for command in ("put", "get"):
        done = client(lone, command, "*.nothing", cwd=work)
        assert done.code == 1 and "*.nothing" in done.out + done.err


def test_folder_goes_up_whole_with_r(lone, work):
    fill(work, TREE)
    done = client(lone, "put", "t", cwd=work)
    assert done.code != 0 and "-r" in done.out + done.err
    fill(work, {"t/" + partial_name("x"): b"half"})
    assert client(lone, "put", "-r", "t", cwd=work).code == 0
    assert tree(os.path.join(lone.upload, "t"), hidden=True) == {name[2:]: data for name, data in TREE.items() if name != "t"}


def test_folder_comes_down_whole_with_r(lone, work):
    fill(lone.download, TREE)
    assert client(lone, "get", "t", cwd=work).code != 0
    assert client(lone, "get", "t", "-r", cwd=work).code == 0
    assert tree(work, hidden=True) == TREE
    (work / "new").mkdir()
    assert client(lone, "get", "-r", "t/sub", "-o", "new", cwd=work).code == 0
    assert "new/sub/deep/c" in tree(work)


@cases("arguments, problem", {
    "pattern": (["*", "-o", "new"], "-o must name a folder"),
    "whole folder": (["-r", ".", "-o", "new"], "-o must name a folder"),
    "folders without -r": (["d*"], "d: a folder: use get -r"),
    "folder in the way": pytest.param(["-r", "d", "-o", "there"], "Not a directory", marks=posix),
    "folder in a file's way": (["-f", "x"], "x: what has that name here is not a file\n"),
    "name that no file can have": pytest.param(["d/d2/y", "-o", "n" * 256], ": File name too long\n", marks=posix),
})
def test_get_that_can_not_be_done_as_asked_is_told_and_does_not_mix_files_up(lone, work, arguments, problem):
    fill(lone.download, {"x": b"x", "d/d2/y": b"y"})
    fill(work, {"there/d": b"a file", "x": None})
    done = client(lone, "get", *arguments, cwd=work)
    assert done.code in (1, 2) and problem in done.err
    assert tree(work, hidden=True) == {"there": None, "there/d": b"a file", "x": None}


def test_what_can_not_be_done_does_not_keep_the_rest_of_a_get_back(lone, work):
    fill(lone.download, {"x/s/deep": b"deep", "y": b"y", "empty": None})
    fill(work, {"x": b"a file"})
    done = client(lone, "get", "-r", "x", "y", "nothing", "*/s/d*", cwd=work)
    assert done.code == 1 and "nothing: " in done.err and "x: " in done.err
    assert tree(work, hidden=True) == {"x": b"a file", "y": b"y", "deep": b"deep"}


def test_literal_part_of_a_pattern_is_not_looked_for_in_a_listing(work):
    held = {"": [("a1", "dir"), ("a2", "dir"), ("b", "dir")], "a1/docs": [("f", "file")]}  # by a server that ignores case

    def ls(peer, header):
        if header["path"].lower() not in held:
            return peer.send({"ok": False, "code": "not-found", "error": "no such folder"})
        listing = wired(*({"name": name, "type": kind, "size": 0, "mtime": 0} for name, kind in held[header["path"].lower()]))
        peer.send({"ok": True, "size": len(listing)}, listing)

    with fake_server(ls=ls) as (port, headers):
        done = client(port, "ls", "a*/DOCS/f*", cwd=work)
    assert (done.code, done.err) == (0, "") and done.out.endswith("  a1/DOCS/f\n") and done.out.count("\n") == 1
    assert [header.get("path") for header in headers] == [None, "", "a1/DOCS", "a2/DOCS"]


def test_one_file_named_twice_is_fetched_once(lone, work):
    fill(lone.download, {"x": b"x"})
    fill(work, {"x": b"old"})
    assert client(lone, "get", "-f", "x", "x", "?", cwd=work).code == 0
    assert tree(work, hidden=True) == {"x": b"x"}


def test_pattern_takes_no_hidden_file_and_a_folder_that_is_missing_is_made(lone, work):
    fill(lone.download, {"x": b"one", ".hidden": b"two"})
    assert client(lone, "get", "*", "-o", "new/", cwd=work).code == 0
    assert tree(work, hidden=True) == {"new": None, "new/x": b"one"}
    assert client(lone, "get", ".*", cwd=work).code == 0 and (work / ".hidden").read_bytes() == b"two"
    assert client(lone, "get", "-f", "x", "-o", "new", cwd=work).out == "x: saved as %s\n" % os.path.join("new", "x")
    assert client(lone, "get", "x", "-o", "other/.", cwd=work).code == 0 and (work / "other" / "x").read_bytes() == b"one"


def test_help_tells_of_all_that_it_lists(work):
    listed = client(1, "help", cwd=work).out.splitlines()
    words = [word.rstrip("]") for line in listed for word in line.split()[:1]]
    assert [client(1, "help", "!" if word.startswith("!") else word, cwd=work).out.strip() for word in words] == listed


@posix
def test_hash_that_the_client_keeps_is_that_of_the_file_as_it_is(work):
    path = fill(work, {"x": b"old"})
    job = ftp_client.Job(None, "x", 3)
    with ftp_client.open_source(path) as file:
        before = os.fstat(file.fileno())
        assert job.hash_once(file, 3).hexdigest() == sha(b"old")
        wait_for(lambda: (fill(work, {"x": b"new"}), os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns)))
                 and os.fstat(file.fileno()).st_ctime_ns != before.st_ctime_ns)
        assert job.hash_once(file, 3).hexdigest() == sha(b"new")


def test_file_here_that_shrinks_while_it_is_hashed_is_fetched_from_the_start(lone, work):
    lone.serves("x", b"hello world")
    fill(work, {"x": b"hello"})
    done = client(lone, "get", "x", cwd=work, patch="""
import ftp_client
def shrank(file, length):
    raise ftp_client.Failed("the file shrank while it was read")
ftp_client.hash_file = shrank
""")
    assert (done.code, done.err) == (0, "") and tree(work, hidden=True) == {"x": b"hello", "x-2": b"hello world"}


def test_file_that_would_replace_another_of_the_same_command_is_left_out_and_told(lone, work):
    fill(lone.download, {"x": b"one", "a/x": b"two", "b/y": b"three"})
    done = client(lone, "get", "-f", "x", "a/x", "b/y", cwd=work)
    assert (done.code, done.err.count("\n")) == (1, 2) and done.err.startswith("a/x: x is saved as x already")
    assert tree(work) == {"x": b"one", "y": b"three"}


@posix
def test_folder_that_is_gone_is_one_line_for_each_file(lone, work):
    lone.serves("x", b"hello")
    fill(work, {"y": b"hello", "gone": None})
    commands = ["!rmdir ../gone", "get x", "put -r . " + shlex.quote(str(work / "y"))]
    done = client(lone, cwd=work / "gone", given="\n".join(commands) + "\n")
    assert len(re.findall("No such file or directory\n", done.err)) == 2 and done.err.count("\n") == 3, done.err
    assert lone.uploads() == {"y": b"hello"}


def test_file_with_a_name_like_that_of_a_partial_is_neither_lost_nor_overwritten(lone, work):
    served = {"k": None, "k/.x.partial": b"one", "k/x": b"two", "k/" + partial_name("x"): b"tw"}
    fill(lone.download, served)
    fill(work, {".x.partial": b"precious"})
    assert client(lone, "get", "k/x", cwd=work).code == 0
    done = client(lone, "get", "-r", "k", cwd=work)
    assert done.code == 1 and done.err.count(partial_name("x")) == 2  # why, and in the summary
    assert tree(work, hidden=True) == {"x": b"two", ".x.partial": b"precious", "k": None, "k/x": b"two", "k/.x.partial": b"one"}


def partial_name(name):
    """The name of the hidden file beside what a client fetches."""
    return ".%s.%s.partial" % (name, sha(name.encode("utf-8"))[:16])


def test_files_of_one_name_are_both_fetched_though_one_was_begun_before(lone, work):
    fill(lone.download, {"a/x": b"in a", "b/x": b"in b"})
    fill(work, {partial_name("x"): b"in"})
    assert client(lone, "get", "a/x", "b/x", cwd=work).code == 0
    assert tree(work, hidden=True) == {"x": b"in a", "x-2": b"in b"}


@posix
def test_files_from_a_far_future_travel(server, work):
    name, far = unique(), 13000000000  # the year 2381, which 34 bits hold, as the common file systems do
    fill(work, {name: b"later"})
    os.utime(str(work / name), (far, far))
    assert client(server, "put", name, cwd=work).code == 0
    assert server.stored(name) == b"later"
    os.utime(server.serves(name, b"later"), (far, far))
    done = client(server, "ls", cwd=work)
    assert done.code == 0 and name in done.out
    assert client(server, "get", name, "-o", "down", cwd=work).code == 0
    assert (work / "down").read_bytes() == b"later"


@linux
@pytest.mark.parametrize("python_locale", ["C", "C.UTF-8"])
def test_local_names_that_are_not_unicode_are_refused_and_unicode_ones_travel_in_any_locale(lone, work, python_locale):
    fill(lone.download, {"né.txt": b"remote"})
    environment = {"LC_ALL": python_locale, "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    assert client(lone, "get", "né.txt", cwd=work, environment=environment).code == 0
    assert tree(work) == {"né.txt": b"remote"}
    done = client(lone, "get", "né.txt", "-o", b"w\xff.txt", cwd=work, environment=environment)
    assert done.code == 1 and "not a Unicode name" in done.err
    with open(os.path.join(os.fsencode(str(work)), b"w\xff.txt"), "wb"):
        done = client(lone, "put", b"w\xff.txt", cwd=work, environment=environment)
    assert done.code == 1 and "not a Unicode name" in done.err
    assert lone.uploads() == {}


@linux
@in_all_modes_at_once
def test_server_finds_unicode_names_in_any_locale(mode, folder):
    environment = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    with serve(mode, folder, environment=environment) as server, server.peer() as peer:
        server.serves("né/ü/ö.txt", b"remote")
        assert peer.get("né/ü/ö.txt")[1] == b"remote"
        assert peer.put("né/ä/é.txt", b"ours")["ok"]
        assert server.stored("né/ä/é.txt") == b"ours"


def test_home_folder_and_names_that_look_like_patterns_are_found(lone, work):
    fill(work, {"a[1].txt": b"1", "a2.txt": b"2"})
    home = {"HOME": str(work), "USERPROFILE": str(work)}
    assert client(lone, "put", "~/a[1].txt", "~/a2*", cwd=os.path.dirname(str(work)), environment=home).code == 0
    assert lone.uploads() == {"a[1].txt": b"1", "a2.txt": b"2"}


def test_ls_shows_what_a_pattern_stands_for(lone, work):
    fill(lone.download, {"a.txt": b"1", "b.txt": b"22", "c": b"", "d/e.txt": b"333", "d[1]/inside": b""})

    def shown(path):
        done = client(lone, "ls", path, cwd=work)
        assert done.code == 0 and done.err == ""
        return [line.split()[-1] for line in done.out.splitlines()]

    assert shown("*.txt") == ["a.txt", "b.txt"]
    assert shown("d/?.txt") == shown("*/*.txt") == ["d/e.txt"]
    assert shown("d[1]") == ["inside"]
    lone.serves("f[1]", b"")
    assert shown("f[1]") == ["f[1]"]
    for path in ("nothing", "no*", "../*", "/*", "d//*", "[z-a]"):
        done = client(lone, "ls", path, cwd=work)
        assert done.code == 1 and done.out == "" and done.err.count("\n") == 1 and done.err.startswith(path + ": ")


def test_folder_that_is_refused_hides_no_others_from_a_pattern(work):
    def ls(peer, header):
        entries = {"": [("closed", "dir"), ("open", "dir")], "open": [("x", "file")]}.get(header["path"])
        if entries is None:
            return peer.send({"ok": False, "code": "denied", "error": "not for you"})
        listing = b"".join(wire({"name": name, "type": kind, "size": 1, "mtime": 0}) for name, kind in entries)
        peer.send({"ok": True, "size": len(listing)}, listing)

    def get(peer, header):
        peer.send({"ok": True, "size": 1, "offset": 0, "mtime": 0}, b"x", {"ok": True, "sha256": sha(b"x")})

    with fake_server(ls=ls, get=get) as (port, headers):
        shown, got = (client(port, command, "*/*", cwd=work) for command in ("ls", "get"))
    assert "open/x" in shown.out and (work / "x").read_bytes() == b"x"
    for done in (shown, got):
        assert done.code == 1 and done.err.splitlines()[0] == "closed: not for you (denied)"
    assert "1 of 2 done" in got.err and got.err.endswith("failed: closed\n")


def test_get_saves_where_it_is_told(lone, work):
    fill(lone.download, {"a/b": b"b"})
    (work / "folder").mkdir()
    assert client(lone, "get", "a/b", cwd=work).code == 0
    assert client(lone, "get", "a/b", "-o", "other name", cwd=work).code == 0
    assert client(lone, "get", "a/b", "-o", "folder", cwd=work).code == 0
    assert tree(work, hidden=True) == {"b": b"b", "other name": b"b", "folder": None, "folder/b": b"b"}


def test_get_keeps_both_and_replaces_only_with_f(lone, work):
    lone.serves("x.txt", b"theirs")
    fill(work, {"x.txt": b"mine"})
    done = client(lone, "get", "x.txt", cwd=work)
    assert done.code == 0 and "x-2.txt" in done.out
    assert tree(work, hidden=True) == {"x.txt": b"mine", "x-2.txt": b"theirs"}
    assert client(lone, "get", "x.txt", cwd=work).code == 0
    assert tree(work, hidden=True) == {"x.txt": b"mine", "x-2.txt": b"theirs"}
    assert client(lone, "get", "-f", "x.txt", cwd=work).code == 0
    assert tree(work, hidden=True) == {"x.txt": b"theirs", "x-2.txt": b"theirs"}
    lone.serves("y", b"a file there")
    (work / "y").mkdir()
    done = client(lone, "get", "-f", "y", cwd=work)
    assert (done.code, done.err) == (1, "y: what has that name here is not a file\n") and os.listdir(str(work / "y")) == []
    if os.name == "posix":
        (work / "x-2.txt").unlink()
        (work / "x-2.txt").symlink_to("y")
        lone.serves("x-2.txt", b"no link")
        assert client(lone, "get", "-f", "x-2.txt", cwd=work).code == 0
        assert tree(work, hidden=True) == {"x.txt": b"theirs", "x-2.txt": b"no link", "y": None}
        os.mkfifo(str(work / "pipe"))
        done = client(lone, "get", "x.txt", "-f", "-o", "pipe", cwd=work)
        assert (done.code, done.err) == (1, "x.txt: what has that name here is not a file\n")
        assert stat.S_ISFIFO(os.lstat(str(work / "pipe")).st_mode)


def test_put_tells_the_name_that_was_stored(lone, work):
    for data, name in ((b"one", "x.txt"), (b"two", "x-2.txt"), (b"two", "x-2.txt")):
        fill(work, {"x.txt": data})
        done = client(lone, "put", "x.txt", cwd=work)
        assert done.code == 0 and name in done.out
    assert lone.uploads() == {"x.txt": b"one", "x-2.txt": b"two"}


@posix
def test_names_of_every_kind_travel(lone, work):
    names = ["two words", "it's", 'say "so"', "100%s", "a|b", "成绩 🎓", "back`tick", "$HOME", "-dash"]
    fill(work, {name: name.encode() for name in names})
    assert client(lone, "put", *["./" + name for name in names], cwd=work).code == 0
    assert set(lone.uploads()) == set(names)
    fill(lone.download, {"d/" + name: name.encode() for name in names})
    (work / "down").mkdir()
    assert client(lone, "get", *["d/" + name for name in names], "-o", "down", cwd=work).code == 0
    assert tree(work / "down", hidden=True) == {name: name.encode() for name in names}


def test_put_of_a_path_stores_its_last_part(lone, work):
    fill(work, {"sub/x": b"x"})
    assert client(lone, "put", "sub/x", cwd=work).code == 0
    assert client(lone, "put", os.path.join("..", "work", "sub", "x"), cwd=work).code == 0
    assert lone.uploads() == {"x": b"x"}


def test_ls_prints_names_and_sizes(lone, work):
    fill(lone.download, {"one.txt": b"12345", "d/two.txt": b"", "empty folder": None})
    done = client(lone, "ls", cwd=work)
    assert done.code == 0 and re.search(r"\b5\b.*one\.txt|one\.txt.*\b5\b", done.out)
    assert "two.txt" not in done.out and "empty folder" in done.out
    assert "two.txt" in client(lone, "ls", "d", cwd=work).out
    assert client(lone, "ls", "missing", cwd=work).code == 1


def test_quiet_client_says_nothing_unless_it_fails(lone, work):
    fill(work, {"x": b"x"})
    done = client(lone, "put", "x", "-q", cwd=work)
    assert done == (0, "", "")
    assert client(lone, "get", "missing", "-q", cwd=work).err


@pytest.mark.parametrize("out, told", [("", "this folder"), ("sub", "sub")])
def test_folder_here_that_takes_nothing_is_named(lone, work, out, told):
    patch = """
import os
def refuse(path, *rest, open=os.open):
    if str(path).endswith(".partial"):
        raise PermissionError(13, "Permission denied", path)
    return open(path, *rest)
os.open = refuse
"""
    (work / "sub").mkdir()
    lone.serves("x", b"x")
    options = ["-o", out] if out else []
    assert client(lone, "get", "x", *options, cwd=work, patch=patch) == (1, "", "x: %s: Permission denied\n" % told)


@at_once_for({
    "short option": ["--vers"], "timeout 1e9": ["--timeout", "1e9"], "port first": ["8885"],
    "option": ["--frob"], "retries": ["--retries", "-1"], "timeout": ["--timeout", "0"], "port": ["127.0.0.1", "http"],
    "port 0x": ["127.0.0.1", "0x50"], "port 70000": ["127.0.0.1", "70000", "ls"], "command": ["127.0.0.1", "1", "frob"],
    "put nothing": ["127.0.0.1", "1", "put"], "get nothing": ["127.0.0.1", "1", "get"],
    "host:port": ["127.0.0.1:8885", "ls"], "[host]:port": ["[::1]:8885"],
    "get -o nowhere": ["127.0.0.1", "1", "get", "x", "-o"], "get -z": ["127.0.0.1", "1", "get", "x", "-z"],
})
def test_wrong_usage_of_the_client_is_exit_2(arguments, work):
    done = run(PYTHON + [CLIENT] + arguments, work)
    assert done.code == 2 and done.err


# ==== Command line: the client, when the connection fails ===========================================================


def helpless(done, *words):
    """See that a connection that failed is one line that says what to check."""
    assert done.code == 1 and done.err.count("\n") == 1 and done.out == ""
    assert all(word in done.err for word in words), done.err


@posix
def test_file_of_twelve_terabytes_is_refused_in_one_line(lone, work):
    try:
        sparse(work / "huge", 12 << 40)
    except OSError as error:
        pytest.skip("no such files here: %s" % error.strerror)
    done = client(lone, "put", "huge", "--retries", "0", cwd=work)
    assert done.code == 1 and "disk-full" in done.err


@posix
def test_connection_that_is_reset_at_once_is_one_helpful_line(work):
    broken = """
import errno, socket
class Reset(socket.socket):
    def getpeername(self):
        raise OSError(errno.ENOTCONN, "not connected")
socket.socket = Reset
"""
    with fake_server() as (port, headers):
        done = client(port, "get", "x", "--retries", "0", cwd=work, patch=broken)
    assert done.code == 1 and done.err.count("\n") == 1


def test_refused_connection_is_one_helpful_line(work):
    with listen() as sock:
        port = sock.getsockname()[1]
    helpless(client(port, "ls", cwd=work, patch=NO_WAIT), "127.0.0.1", str(port), "running", "address", "firewall")  # it is tried once


@pytest.mark.parametrize("host", ["no..such", "x" * 64 + ".invalid", "no.such.host"])
def test_unknown_host_is_one_helpful_line(work, host):
    patch = "import socket\ndef look_up(*args, **kwargs): raise socket.gaierror(-2, 'Name or service not known')\n"
    command = launch(CLIENT, patch + ("socket.getaddrinfo = look_up" if host == "no.such.host" else ""))
    helpless(run(command + [host, "8885", "ls"], work), host[:30])


@linux
@early
def test_silence_is_one_helpful_line(work):
    with listen(0) as full, listen() as silent, contextlib.ExitStack() as stack:
        for _ in range(5):  # Linux drops what a full backlog can't take
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        ports = [sock.getsockname()[1] for sock in (full, silent)]
        done = at_once(*[lambda port=port: client(port, "ls", "--timeout", "1", cwd=work) for port in ports])
    helpless(done[0], "127.0.0.1", "firewall")
    helpless(done[1])


NO_WAIT = "import time; time.sleep = lambda seconds: print('pause', seconds)"


@cases("verb, size, cuts, lost", {
    "get": ("get", 500000, [("down", 100000)], 0), "get twice": ("get", 500000, [("down", 150000)] * 2, 0),
    "get's request": ("get", 500000, [("up", 30)], 0), "small get": ("get", 50000, [("down", 30000)], 0),
    "put": ("put", 500000, [("up", 100000)], 0), "put twice": ("put", 500000, [("up", 150000)] * 2, 0),
    "small put": ("put", 50000, [("up", 10000), ("up", 30000)], 10000)})  # the first try of a small one has no id
def test_broken_transfer_goes_on_where_it_broke(lone, work, verb, size, cuts, lost):
    data = content(size)
    fill(work if verb == "put" else lone.download, {"x": data})
    with Proxy(lone.port, cuts) as proxy:
        done = client(proxy.port, verb, "x", cwd=work, patch=NO_WAIT)
    assert done.code == 0 and done.out.count("pause") == len(cuts)
    assert (lone.uploads() if verb == "put" else tree(work, hidden=True)) == {"x": data}
    assert max(proxy.moved.values()) < size + lost + 10000  # no other byte of the payload was moved twice


@cases("count, size, cut", {"asked for after a break": (200, 20000, 300000), "too small for that": (100, 10000, 40000)})
def test_small_files_get_through_a_line_that_breaks_again_and_again(lone, work, count, size, cut):
    files = {"d/%03d" % number: content(size, number) for number in range(count)}
    fill(work, files)
    with Proxy(lone.port, [("up", cut)] * 60) as proxy:
        done = client(proxy.port, "put", "-r", "d", cwd=work, patch=NO_WAIT)
    assert done.code == 0 and "%d of %d done" % (count, count) in done.out
    assert lone.uploads() == dict(files, d=None)


def listing(*names, kind="file"):
    """The answer to ls: so many files, or folders."""
    lines = wired(*({"name": name, "type": kind, "size": 10 * (kind == "file"), "mtime": 0} for name in names))
    return wired({"ok": True, "size": len(lines)}, lines)


def get_ten(peer, header):
    peer.send(OK_GET, b"1234567890", {"ok": True, "sha256": sha(b"1234567890")})


def asked_for(headers):
    """How often each name was asked for."""
    return collections.Counter(header["name"] for header in headers if "name" in header)


def test_file_that_always_breaks_the_connection_fails_alone(work):
    def get(peer, header):
        if header["name"] in ("bad", "worse") or header["name"] == "unlucky" and asked_for(headers)["unlucky"] == 1:
            peer.send(OK_GET, b"123")
            raise Hangup
        get_ten(peer, header)

    with fake_server(get=get) as (port, headers):
        done = client(port, "get", "bad", "worse", "unlucky", "good", "--retries", "2", cwd=work, patch=NO_WAIT)
    assert done.code == 1 and "bad: given up" in done.err and "2 of 4 done" in done.err
    assert tree(work) == {"unlucky": b"1234567890", "good": b"1234567890"}
    assert asked_for(headers) == {"bad": 3, "worse": 2, "unlucky": 2, "good": 1}


@pytest.mark.parametrize("retries", ["0", "5"])
def test_connection_that_breaks_behind_the_last_answer_is_not_made_again(work, retries):
    fill(work, {"d/%d" % number: content(250000, number) for number in range(5)})
    ended = threading.Event()

    def put(peer, header):
        if header["name"] != "d/4":
            peer.read(header["size"])
            peer.line()
            return
        peer.send(*[{"ok": False, "code": "denied", "error": "not today"}] * 5)
        peer.sock.shutdown(socket.SHUT_WR)
        ended.wait(4 * PATIENCE)

    with fake_server(put=put) as (port, headers):
        try:
            done = client(port, "put", "-r", "d", "--retries", retries, cwd=work,
                          patch="import ftp_client; ftp_client.LOOPBACK_BUFFER = 16384")
        finally:
            ended.set()
    assert done.code == 1 and done.err.count("not today") == 5 and "0 of 5 done" in done.err
    assert "interrupted" not in done.err and len(headers) == 6


def test_put_that_breaks_the_connection_among_many_fails_alone(work):
    def put(peer, header):
        if header["name"] == "d/20":
            raise Hangup
        data = peer.read(header["size"])
        peer.line()
        peer.send(dict(header, ok=True, sha256=sha(data), duplicate=False))

    files = {"%02d" % number: content(100000, number) for number in range(40)}
    (work / "d").mkdir()
    fill(work / "d", files)
    with fake_server(put=put, resume={"ok": True, "offset": 0, "sha256": sha(b"")}) as (port, headers):
        done = client(port, "put", "-r", "d", "--retries", "2", cwd=work, patch=NO_WAIT)
    assert done.code == 1 and done.err.splitlines()[-1].endswith("failed: d/20") and "39 of 40 done" in done.err
    sent = asked_for(header for header in headers if header["cmd"] == "put")
    assert sent == dict({"d/" + name: 1 for name in files}, **{"d/20": 3})


@linux
@in_all_modes_at_once
def test_long_names_of_many_files_do_not_stop_both_sides_at_once(mode, folder):
    """Requests that fill all buffers of one way while the answers fill those of the other would wait for ever."""
    path, files = os.path.join(*["文" * 80] * 15), {"%03d" % number: content(100000, number) for number in range(300)}
    with serve(mode, folder) as server:
        (folder / "work").mkdir()
        os.makedirs(os.path.join(server.download, "d", path))
        fill(os.path.join(server.download, "d", path), files)
        done = client(server, "get", "-r", "d", "--timeout", "10", "--retries", "0", cwd=folder / "work")
        assert done.code == 0 and tree(folder / "work" / "d" / path) == files


def test_files_that_cannot_be_stored_here_cost_no_connection(lone, work, tmp_path):
    files, faults = {"%02d" % number: content(9000, number) for number in range(40)}, Faults(tmp_path)
    os.mkdir(os.path.join(lone.download, "d"))
    fill(os.path.join(lone.download, "d"), files)
    faults.arm("raise", ["write"], last=20, error=errno.ENOSPC)
    start = len(lone.log())
    done = client(lone, "get", "-r", "-f", "d", cwd=work, faults=faults)
    assert done.code == 1 and "20 of 40 done" in done.err
    assert {name: data for name, data in tree(work / "d").items() if data} == dict(list(files.items())[20:])
    wait_for(lambda: lone.log()[start:].count(" left") == 1)
    assert lone.log()[start:].count(" connected") == 1 and lone.log()[start:].count(" get ") == 40


def test_large_file_that_cannot_be_stored_here_is_not_read_to_its_end(work, tmp_path):
    sent, faults = [], Faults(tmp_path)
    faults.arm("raise", ["write"], error=errno.ENOSPC)

    def get(peer, header):
        if header["name"] == "small":
            return get_ten(peer, header)
        peer.send({"ok": True, "size": 64 * MIB, "offset": 0, "mtime": 0})
        while len(sent) < 64:
            peer.send(bytes(MIB))
            sent.append(MIB)
        peer.send({"ok": True, "sha256": sha(bytes(64 * MIB))})

    with fake_server(get=get) as (port, headers):
        done = client(port, "get", "big", "small", cwd=work, faults=faults)
    assert done.code == 1 and "1 of 2 done" in done.err and len(sent) < 64
    assert tree(work) == {"small": b"1234567890"}


@early
@in_all_modes_at_once
def test_slow_disk_here_does_not_make_the_server_think_that_nobody_is_there(mode, folder):
    patch = "import ftp_client, os, time; ftp_client.WINDOW, os.fsync = 16, lambda fd: time.sleep(0.4)"
    (folder / "work").mkdir()
    with serve(mode, folder, "--timeout", "5.5") as server:
        os.mkdir(os.path.join(server.download, "d"))
        fill(os.path.join(server.download, "d"), {"%03d" % number: b"x" for number in range(24)})
        done = client(server, "get", "-r", "d", "--retries", "0", cwd=folder / "work", patch=patch)
        assert done.code == 0 and len(tree(folder / "work" / "d")) == 24
        assert server.log().count(" connected") == 1


def test_of_a_file_that_has_grown_only_the_rest_is_fetched(lone, work):
    data = content(500000)
    fill(work, {"x": data[:300000]})
    lone.serves("x", data)
    with Proxy(lone.port) as proxy:
        done = client(proxy.port, "get", "x", cwd=work)
    assert done.code == 0 and "x-2" in done.out and proxy.moved["down"] < 210000
    assert tree(work, hidden=True) == {"x": data[:300000], "x-2": data}


def test_partial_of_a_get_that_was_killed_at_once_goes_though_the_file_is_here_already(lone, work):
    name = os.path.join(str(work), partial_name("x"))
    lone.serves("x", b"hello")
    fill(work, {"x": b"hello", partial_name("x"): b""})
    assert client(lone, "get", "x", cwd=work).out == "x: already here\n" and tree(work, hidden=True) == {"x": b"hello"}
    with open(name, "wb") as file:
        ftp_client.lock(file.fileno())
        assert client(lone, "get", "x", cwd=work).out == "x: already here\n" and os.path.exists(name)  # under way elsewhere
    if os.name == "posix":
        os.unlink(name)
        os.symlink("nowhere", name)  # never opened
        assert client(lone, "get", "x", cwd=work) == (0, "x: already here\n", "")


@pytest.mark.parametrize("more, same", [(b"", True), (b"x", False)], ids=["equal", "grown"])
def test_file_here_that_grows_while_it_is_compared_is_another(tmp_path, monkeypatch, more, same):
    size = ftp_client.CHUNK
    fill(tmp_path, {"x": content(size), "y": content(size) + more})
    looks_alike = os.stat(str(tmp_path / "x"))
    monkeypatch.setattr(ftp_client.os, "fstat", lambda fd: looks_alike)
    assert ftp_client.same_content(str(tmp_path / "x"), str(tmp_path / "y")) is same


def test_file_here_that_changes_before_the_answer_is_not_mixed_with_it(work):
    def get(peer, header):
        fill(work, {"x": b"M" * 1000})
        peer.send({"ok": True, "size": 2000, "offset": 1000, "mtime": 0}, b"B" * 1000, {"ok": True, "sha256": None})

    fill(work, {"x": b"A" * 1000})
    with fake_server(get=get) as (port, headers):
        done = client(port, "get", "x", "--no-verify", cwd=work)
    assert done.code == 1 and "changed" in done.err and tree(work) == {"x": b"M" * 1000}


@posix
def test_file_here_that_cannot_be_looked_at_is_not_taken_for_another(lone, work, tmp_path):
    faults, same = Faults(tmp_path), b"2" * 1000
    lone.serves("x", same)
    for number in range(1, 12):
        fill(work, {"x": b"1" * 1000, "x-2": same})
        faults.arm("raise", ["open"], at=number, error=errno.EMFILE)
        done = client(lone, "get", "x", cwd=work, faults=faults)
        assert done.code == 1 or "already here as x-2" in done.out
        assert tree(work) == {"x": b"1" * 1000, "x-2": same}
        if not faults.struck():
            break
    assert 2 < number < 11


def test_listing_that_breaks_is_asked_for_again(work):
    answers = [listing("d", kind="dir"), listing("x")[:-5], listing("x")]

    def ls(peer, header):
        peer.send(answers.pop(0))
        if len(answers) == 1:
            raise Hangup

    with fake_server(ls=ls, get=get_ten) as (port, headers):
        done = client(port, "get", "-r", "d", cwd=work, patch=NO_WAIT)
    assert done.code == 0 and tree(work) == {"d": None, "d/x": b"1234567890"} and not answers


@cases("bad", {"broken": b'{"ok": true, "size": 99}\n', "nonsense": b"nonsense\n"})
def test_folder_that_can_not_be_listed_spoils_no_other(work, bad):
    def ls(peer, header):
        answers = {"": listing("first", "bad", "good", kind="dir"), "bad": bad}
        peer.send(answers.get(header["path"], listing("x")))
        if header["path"] == "bad":
            raise Hangup

    with fake_server(ls=ls, get=get_ten) as (port, headers):
        done = client(port, "get", "-r", "first", "bad", "good", "--retries", "1", cwd=work, patch=NO_WAIT)
    assert done.code == 1 and "failed: bad" in done.err
    assert sorted(name for name, data in tree(work).items() if data) == ["first/x", "good/x"]


def test_server_that_goes_away_between_two_files_is_tried_again(work):
    fill(work, {"a": content(400000), "b": content(400000, 1)})
    patch = """
import ftp_client  # sees the end of the connection before it asks for the second file
real, ftp_client.FIRST_PAUSE = ftp_client.FtpClient.create_socket, 0.01
def create_socket(self):
    if self.link and self.bar.finished:
        ftp_client.wait_for(self.link.sock, ftp_client.READ, 20)
    real(self)
ftp_client.FtpClient.create_socket = create_socket
"""
    listener = listen()

    def serve_one_file():
        with Peer(listener.accept()[0]) as peer:
            for answer in (HELLO, {"ok": True, "offset": 0, "sha256": sha(b"")}):
                peer.line()
                peer.send(answer)
            size = peer.line()["size"]
            sha256 = sha(peer.read(size))
            peer.line()
            peer.send({"ok": True, "name": "a", "size": size, "sha256": sha256, "duplicate": False})
            listener.close()

    with ThreadPoolExecutor(1) as pool:
        serving = pool.submit(serve_one_file)
        done = client(listener.getsockname()[1], "put", "a", "b", "--retries", "2", cwd=work, patch=patch)
        serving.result(PATIENCE)
    assert done.code == 1 and "stored as a" in done.out
    assert "2 of 2" in done.err and "b: given up" in done.err


def test_remote_folders_nested_too_deeply_are_one_line(work):
    ls = {"": listing("top", kind="dir"), "top": listing("/".join("d" * 1500))}
    with fake_server(ls=lambda peer, header: peer.send(ls[header["path"]]), get=get_ten) as (port, headers):
        done = client(port, "get", "-r", "top", cwd=work)
    assert done.code == 1 and done.err.count("\n") == 1 and "inside one another" in done.err


def test_place_for_a_get_that_is_too_deep_is_one_line(lone, work):
    lone.serves("x", b"hello")
    done = client(lone, "get", "x", "-o", "d/" * 1500, cwd=work, patch="import sys; sys.setrecursionlimit(300)")
    assert done == (1, "", "too many folders inside one another\n")


def test_local_folders_nested_too_deeply_are_one_line(work):
    os.makedirs(os.path.join(str(work), *["d"] * 400))
    patch = "import sys, ftp_client; sys.setrecursionlimit(300)"
    with fake_server(mkdir={"ok": True, "name": "d"}) as (port, headers):
        done = client(port, "put", "-r", "d", cwd=work, patch=patch)
    if done.code:  # before Python 3.12
        assert done.err.count("\n") == 1 and "inside one another" in done.err
    else:
        assert headers[-1]["cmd"] == "mkdir"


@posix
@pytest.mark.parametrize("replace", [False, True])
def test_partial_file_that_another_took_the_name_of_is_not_published(tmp_path, replace):
    target = ftp_client.Target(str(tmp_path / "x"))
    target.open()
    target.file.write(b"whole")
    os.unlink(target.partial)
    with pytest.raises(ftp_client.Failed, match="removed"):
        target.publish(None, replace)
    fill(tmp_path, {os.path.basename(target.partial): b"ha"})
    with pytest.raises(ftp_client.Failed, match="removed"):
        target.publish(None, replace)
    target.close()
    assert tree(tmp_path, hidden=True) == {os.path.basename(target.partial): b"ha"}


@posix
def test_rename_that_fails_on_windows_ends_that_file_only(tmp_path, monkeypatch):
    target = ftp_client.Target(str(tmp_path / "x"))
    target.open()
    target.file.write(b"abc")
    with monkeypatch.context() as windows:
        windows.setattr(os, "name", "nt")
        target.file.close()  # as publish() does before the rename that fails
        target.close()
    assert os.path.getsize(target.partial) == 3


@linux
def test_folder_that_takes_no_files_is_one_line(lone, work):
    lone.serves("x", b"hello")
    done = client(lone, "get", "x", "-o", "/proc/x", cwd=work)  # a folder that is there, and answers "no such file"
    assert done.code == 1 and done.err.count("\n") == 1 and "/proc: " in done.err


def test_pattern_that_is_none_spoils_no_other(lone, work):
    fill(work, {"a": b"a"})
    assert client(lone, "put", "[z-a]", "a", cwd=work).code == 1
    assert client(lone, "get", "[z-a]", cwd=work).code == 1
    assert lone.uploads() == {"a": b"a"}


def test_tilde_is_the_home_unless_something_here_has_that_name(lone, work):
    fill(work, {"~/x": b"here", "home/secret": b"secret", "~nobody": b"file"})
    environment = {variable: str(work / "home") for variable in ("HOME", "USERPROFILE")}
    assert client(lone, "put", "-r", "~", "~nobody", "~/secret", cwd=work, environment=environment).code == 0
    assert lone.uploads() == {"~": None, "~/x": b"here", "~nobody": b"file", "secret": b"secret"}


@posix
def test_folder_that_holds_only_a_link_is_made_on_the_server(lone, work):
    fill(work, {"d/inner": None, "elsewhere": None})
    os.symlink(str(work / "elsewhere"), str(work / "d" / "inner" / "link"))
    done = client(lone, "put", "-r", "d", cwd=work)
    assert done.code == 1 and lone.uploads() == {"d": None, "d/inner": None}


def test_all_of_the_download_folder_is_a_folder_too(lone, work):
    lone.serves("x", b"x")
    for name in ("/", ".", "./"):
        done = client(lone, "get", name, cwd=work)
        assert done.code == 1 and "get -r" in done.err and tree(work) == {}
    assert client(lone, "get", "-r", ".", cwd=work).code == 0 and tree(work) == {"x": b"x"}


@pytest.mark.skipif(sys.version_info < (3, 7), reason="sys.stdin.reconfigure() is new in Python 3.7")
def test_typed_line_that_is_no_text_spoils_no_other(lone, work):
    fill(work, {"a": b"a", "b": b"b"})
    done = client(lone, cwd=work, given="put a\nput \udcff\nput b\n")
    assert lone.uploads() == {"a": b"a", "b": b"b"} and "no such file" in done.err


@linux
def test_small_file_that_has_become_huge_is_not_taken_into_memory(work):
    fill(work, {"x": b"x"})
    put = ftp_client.Put(mock.Mock(), str(work / "x"), "x")
    put.size = GIB
    file = mock.Mock()
    file.read.return_value = bytes(10)
    with pytest.raises(ftp_client.Failed, match="changed"):
        put.send_at_once(file)
    assert file.read.call_args[0][0] <= ftp_client.SMALL + 1


@posix
@cases("error, code", {"no sendfile there": (errno.EINVAL, 0), "read error": (errno.EIO, 1)})
def test_sendfile_that_fails_is_made_up_for_or_told(lone, work, tmp_path, error, code):
    faults, files = Faults(tmp_path), {"a": content(MIB), "b": content(300000)}
    fill(work, files)
    faults.arm("raise", ["sendfile"], error=error)
    done = client(lone, "put", "a", "b", "--no-verify", "--retries", "0", cwd=work, faults=faults,
                  patch=STAMPS["by its stamps"] % "client")
    assert done.code == code and faults.struck()
    assert lone.uploads() == {name: files[name] for name in "ab"[code:]}
    assert not code or "a: Input/output error" in done.err


def test_put_whose_answer_was_lost_is_not_stored_twice(lone, work):
    fill(work, {"x": content(500000), "y": content(500000, 1)})
    with Proxy(lone.port) as proxy:
        assert client(proxy.port, "put", "x", cwd=work).code == 0
    with Proxy(lone.port, [("down", proxy.moved["down"] - 10)]) as proxy:
        assert client(proxy.port, "put", "y", cwd=work, patch=NO_WAIT).code == 0
    assert proxy.connections == 2
    assert lone.uploads() == tree(work)


@pytest.mark.parametrize("retries, code", [("2", 1), ("3", 0)])
def test_pauses_grow_until_the_retries_are_used_up(lone, work, retries, code):
    lone.serves("x", content(500000))
    with Proxy(lone.port, [("down", 300000)] + [("up", 5)] * 2) as proxy:
        done = client(proxy.port, "get", "x", "--retries", retries, cwd=work, patch=NO_WAIT)
    assert done.code == code
    pauses = [float(seconds) for seconds in re.findall(r"pause ([\d.]+)", done.out)]
    assert len(pauses) == int(retries) and pauses == sorted(set(pauses))


@pytest.mark.parametrize("changed", [False, True], ids=["same file", "other content"])
def test_later_get_goes_on_if_the_content_is_the_same(lone, work, changed):
    old, new = content(500000, 1), content(500000, 2 if changed else 1)
    path = lone.serves("x", old)
    stamp = os.stat(path).st_mtime_ns
    with Proxy(lone.port, [("down", 300000)]) as proxy:
        assert client(proxy.port, "get", "x", "--retries", "0", cwd=work).code == 1
        assert tree(work) == {}  # the partial is hidden
        lone.serves("x", new)
        os.utime(path, ns=(stamp, stamp))  # the same size and time: only the hash can tell
        assert client(proxy.port, "get", "x", cwd=work).code == 0
    assert tree(work, hidden=True) == {"x": new}
    assert changed or proxy.moved["down"] < 510000


@cases("change, patch", {"rewritten": ("rewritten", "by its stamps"), "shorter": ("shorter", "by its stamps"),
                         "rewritten within a tick": ("rewritten", "by its content")})
def test_classic_put_of_a_file_that_changes_meanwhile_is_an_error_that_says_so(work, tmp_path, change, patch):
    data = content(16 * MIB)
    fill(work, {"x": data})
    with serve("selectors", tmp_path) as server, Proxy(server.port, hold=("up", MIB)) as proxy, ThreadPoolExecutor(1) as pool:
        running = pool.submit(client, proxy.port, "put", "x", "--classic", "--retries", "3", cwd=work,
                              patch=STAMPS[patch] % "client")
        assert proxy.held.wait(PATIENCE)
        with open(str(work / "x"), "r+b") as file:
            file.truncate(2 * MIB) if change == "shorter" else file.write(content(len(data), 2))
        proxy.release()
        done = running.result()
        assert done.code == 1 and re.search("chang|shrank", done.err) and proxy.connections == 1
        wait_for(lambda: server.log().count(" failed: ") == 1)
        assert server.uploads() == {}


@early
def test_classic_put_is_not_called_sent_if_the_server_has_hung_up_before_its_last_byte(folder):
    fill(folder, {"x": content(1000)})
    patch = "import ftp_client, time; ftp_client.changed = lambda file, before: time.sleep(6)"
    with serve("selectors", folder, "--timeout", "3") as server:
        done = client(server, "put", "x", "--classic", cwd=folder, patch=patch)
        assert done.code == 1 and "the server closed the connection" in done.err and server.uploads() == {}


def test_classic_put_that_breaks_is_not_sent_again(lone, work):
    fill(work, {"x": content(16 * MIB)})
    with Proxy(lone.port, [("up", 100000)]) as proxy:
        done = client(proxy.port, "put", "x", "--classic", "--retries", "3", cwd=work, patch=NO_WAIT)
    assert done.code == 1 and proxy.connections == 1 and "may have stored a part" in done.err


@pytest.mark.parametrize("options", [[], ["--no-verify"]], ids=["verified", "not verified"])
@pytest.mark.parametrize("change", ["rewritten", pytest.param("rewritten, with its old time", marks=posix),
                                    "rewritten within a tick", "shorter"])
def test_put_of_a_file_that_changes_meanwhile_is_an_error_that_says_so(lone, work, change, options):
    data = content(16 * MIB)
    fill(work, {"x": data})
    with Proxy(lone.port, hold=("up", MIB)) as proxy, ThreadPoolExecutor(1) as pool:
        patch = STAMPS["by its content" if "tick" in change else "by its stamps"] % "client"
        running = pool.submit(client, proxy.port, "put", "x", "--retries", "0", *options, cwd=work, patch=patch)
        assert proxy.held.wait(PATIENCE)
        stamp = os.stat(str(work / "x")).st_mtime_ns
        with open(str(work / "x"), "r+b") as file:
            file.truncate(2 * MIB) if change == "shorter" else file.write(content(len(data), 2))
        if "old time" in change:
            os.utime(str(work / "x"), ns=(stamp, stamp))
        proxy.release()
        done = running.result()
    assert done.code == 1 and re.search("chang|shr[aiu]nk|shorter", done.out + done.err)
    assert lone.uploads() == {}


@pytest.mark.parametrize("limit", [0, 60], ids=["settled", "fresh"])
def test_hash_of_what_is_sent_is_kept_for_the_next_try(tmp_path, monkeypatch, limit):
    path = fill(tmp_path, {"x": b"1" * 1000})
    stamps = os.stat(path)
    monkeypatch.setattr(ftp_client, "FRESH", limit)
    monkeypatch.setattr(os, "fstat", lambda fd: stamps)
    job = ftp_client.Job(None, "x", 1000)
    with open(path, "r+b", buffering=0) as file:
        first = job.hash_once(file, 1000).digest()
        file.seek(0)
        file.write(b"2" * 1000)
        assert job.hash_once(file, 1000).digest() == first


def test_put_whose_hash_was_kept_from_an_earlier_try_mixes_no_two_versions(lone, work):
    """The file changes between the tries, at first so soon after it was written that no stamp tells."""
    fill(work, {"x": b"1" * 4 * MIB})
    patch = STAMPS["by its content"] % "client" + """
def sleep(seconds, pauses=[]):
    pauses.append(seconds)
    if len(pauses) == 2:
        script.fresh = lambda info: False
        with open("x", "r+b") as file:
            file.write(b"2" * (4 << 20))

script.time.sleep = sleep
"""
    with Proxy(lone.port, [("up", 2 * MIB), ("up", 200)]) as proxy:  # the latter breaks in the header of the put
        done = client(proxy.port, "put", "x", cwd=work, patch=patch)
    assert done.code == 1 and "changed while it was read" in done.err and proxy.connections == 3
    assert lone.uploads() == {}


@cases("patch", STAMPS)
def test_small_file_that_changes_while_it_is_read_is_an_error_that_says_so(lone, work, patch):
    fill(work, {"x": b"1" * 1000, "y": b"1"})
    done = client(lone, "put", "x", "y", cwd=work, patch=patch % "client" + """
import os
def check(put, *arguments, check=script.Put.check):
    if put.name == "x":
        with open("x", "r+b") as file:
            file.write(b"2" * 1000)
    check(put, *arguments)
script.Put.check = check
""")
    assert done.code == 1 and "x: the file changed while it was read: try again\n" in done.err
    assert lone.uploads() == {"y": b"1"}


@posix
@pytest.mark.parametrize("classic", [[], ["--classic"]], ids=["framed", "classic"])
def test_ctrl_c_ends_the_command_with_130(lone, work, classic):
    sparse(os.path.join(lone.download, "big"), 64 * MIB)
    with Proxy(lone.port, hold=("down", MIB)) as proxy:
        command = [CLIENT, "127.0.0.1", str(proxy.port), "get", "big", "--timeout", str(PATIENCE / 2)]      # as for --find above
        process = subprocess.Popen(PYTHON + command + classic, cwd=str(work),
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT)
        with process:
            try:
                assert proxy.held.wait(PATIENCE)
                wait_for(lambda: any(tree(work, hidden=True).values()))    # what has passed the proxy may not be here yet
                process.send_signal(signal.SIGINT)
                out, err = process.communicate(timeout=PATIENCE)
            finally:
                process.kill()
    assert process.returncode == 130 and b"Traceback" not in err
    assert (b"goes on where it was" in err) == (not classic)
    assert tree(work) == {}


def test_folder_that_can_not_be_made_spoils_nothing_else(lone, work):
    fill(lone.download, {"a/b/c/f": b"f", "a/e": b"e"})
    fill(work, {"a/b": b"in the way"})
    done = client(lone, "get", "-r", "a", cwd=work)
    assert done.code == 1 and "a/b" in done.err and "failed: a" in done.err
    assert tree(work) == {"a": None, "a/b": b"in the way", "a/e": b"e"}


@posix
def test_client_neither_reads_special_files_nor_writes_through_links(lone, work, tmp_path):
    outside = os.path.dirname(fill(tmp_path / "outside", {"victim": b"before"}))
    fill(work, {"t/a": b"a", "down": None})
    os.symlink("..", str(work / "t" / "loop"))
    os.mkfifo(str(work / "t" / "fifo"))
    assert client(lone, "put", "t/fifo", "t/a", cwd=work).code == 1
    client(lone, "put", "-r", "t", cwd=work)  # whatever it says of the two, it ends
    assert {name for name, data in lone.uploads().items() if data is not None} == {"a", "t/a"}
    fill(lone.download, {"file": b"after", "dangling": b"after", "big": content(500000)})
    os.symlink(os.path.join(outside, "victim"), str(work / "down" / "file"))
    os.symlink(os.path.join(outside, "new"), str(work / "down" / "dangling"))
    for options in ([], ["-f"]):
        client(lone, "get", "file", "dangling", *options, cwd=work / "down")
    (work / "cut").mkdir()
    with Proxy(lone.port, [("down", 300000)]) as proxy:
        client(proxy.port, "get", "big", "--retries", "0", cwd=work / "cut")
    partial, = tree(work / "cut", hidden=True)
    os.unlink(str(work / "cut" / partial))
    os.symlink(os.path.join(outside, "victim"), str(work / "cut" / partial))
    client(lone, "get", "big", "--retries", "0", cwd=work / "cut")
    assert tree(outside, hidden=True) == {"victim": b"before"}


@posix
def test_kill_at_any_operation_leaves_the_download_whole_or_resumable(lone, work, tmp_path):
    faults, data = Faults(tmp_path), content(500000)
    lone.serves("x", data)
    for number in range(1, 60):
        faults.arm("kill", at=number)
        client(lone, "get", "x", cwd=work, faults=faults)
        struck = faults.struck()
        faults.disarm()
        assert tree(work) in ({}, {"x": data})
        kept = 0 if tree(work) else sum(len(left) for left in tree(work, hidden=True).values())
        with Proxy(lone.port) as proxy:
            assert client(proxy.port, "get", "x", cwd=work).code == 0
        assert tree(work, hidden=True) == {"x": data}
        assert not struck or proxy.moved["down"] < len(data) - kept + 5000
        if not struck:
            break
        os.unlink(str(work / "x"))
    assert 3 < number < 59


@posix
def test_file_saved_at_the_instant_of_a_kill_is_never_written_to_again(lone, work, tmp_path):
    faults = Faults(tmp_path)
    lone.serves("x", b"old")
    faults.arm("kill", ["unlink", "remove"])
    client(lone, "get", "x", cwd=work, faults=faults)
    faults.disarm()
    assert tree(work) == {"x": b"old"}
    lone.serves("x", b"new")
    assert client(lone, "get", "x", cwd=work).code == 0
    assert tree(work, hidden=True) == {"x": b"old", "x-2": b"new"}


@posix
@pytest.mark.parametrize("there", [False, True], ids=["new", "existing"])
def test_partial_saved_by_another_client_before_the_lock_is_never_written_to_again(tmp_path, monkeypatch, there):
    target, flock = ftp_client.Target(str(tmp_path / "x")), fcntl.flock
    if there:
        fill(tmp_path, {partial_name("x"): b"who"})

    def late(fd, how):
        monkeypatch.setattr(fcntl, "flock", flock)
        other = ftp_client.Target(target.path)
        other.open()
        other.file.write(b"whole")
        other.publish(None, False)
        flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", late)
    assert target.open() == 0
    target.file.write(b"other")
    assert target.publish(None, False) == (str(tmp_path / "x-2"), False)
    assert tree(tmp_path, hidden=True) == {"x": b"whole", "x-2": b"other"}


@posix
def test_client_gives_the_name_only_after_the_flush(lone, work, tmp_path):
    faults = Faults(tmp_path)
    lone.serves("x", b"data")
    faults.arm("raise", FLUSHING)
    assert client(lone, "get", "x", "--retries", "0", cwd=work, faults=faults).code == 1
    assert faults.struck() and tree(work) == {}
    faults.arm("raise", FLUSHING, at=2)  # of the folder: the file is there, whatever comes of this
    assert client(lone, "get", "x", cwd=work, faults=faults).code == 0
    assert faults.struck() and tree(work) == {"x": b"data"}


@posix
def test_client_on_a_disk_without_hard_links_keeps_both_all_the_same(lone, work, tmp_path):
    faults = Faults(tmp_path)
    fill(work, {"x": b"mine"})
    lone.serves("x", b"theirs")
    faults.arm("raise", ["link"], last=99, error=errno.EPERM)
    assert client(lone, "get", "x", cwd=work, faults=faults).code == 0 and faults.struck()
    assert tree(work, hidden=True) == {"x": b"mine", "x-2": b"theirs"}


@posix
def test_partial_that_another_client_is_fetching_into_is_left_to_it(lone, work):
    data = content(1000)
    lone.serves("x", data)
    fill(work, {partial_name("x"): data[:500]})
    with open(str(work / partial_name("x")), "rb") as partial:
        fcntl.flock(partial.fileno(), fcntl.LOCK_EX)
        done = client(lone, "get", "x", cwd=work)
    assert done.code == 1 and "another client" in done.err
    assert tree(work, hidden=True) == {partial_name("x"): data[:500]}


@posix
def test_error_at_any_operation_of_the_client_is_told(lone, work, tmp_path):
    faults, data = Faults(tmp_path), content(500000)
    lone.serves("x", data)
    for number in range(1, 60):
        faults.arm("raise", at=number, error=errno.ENOSPC)
        done = client(lone, "get", "x", "--retries", "0", cwd=work, faults=faults)
        struck = faults.struck()
        faults.disarm()
        assert done.code == 0 or (done.code == 1 and done.err)
        assert tree(work) == {"x": data} or (done.code == 1 and tree(work) == {})
        if not struck:
            break
        with contextlib.suppress(FileNotFoundError):
            os.unlink(str(work / "x"))
    assert 3 < number < 59


@posix
def test_file_that_can_not_be_read_to_its_end_spoils_no_other(lone, work, tmp_path):
    faults, files = Faults(tmp_path), {"a": content(MIB), "b": content(1000), "c": content(300000)}
    fill(work, files)
    for number in range(1, 60):
        faults.arm("raise", ["read"], at=number)
        done = client(lone, "put", "a", "b", "c", "--retries", "0", cwd=work, faults=faults)
        struck = faults.struck()
        faults.disarm()
        failed = [name for name in files if re.search("^%s: Input/output error" % name, done.err, re.MULTILINE)]
        assert len(failed) == struck and done.code == struck
        assert lone.uploads() == {name: data for name, data in files.items() if name not in failed}
        if not struck:
            break
        for name in lone.uploads():
            os.unlink(os.path.join(lone.upload, name))
    assert 6 < number < 59


TELL_PEAK = "import atexit\nfrom resource import *\natexit.register(lambda: print(getrusage(RUSAGE_SELF).ru_maxrss))"


@linux
def test_memory_of_the_client_does_not_grow_with_the_file(lone, work):
    sparse(os.path.join(lone.download, "big"), 128 * MIB)
    sparse(os.path.join(lone.download, "small"), 2 * MIB)

    def peak(*arguments):
        done = client(lone, *arguments, cwd=work, patch=TELL_PEAK)
        assert done.code == 0
        return int(done.out.split()[-1]) * KIB

    assert peak("get", "big") - peak("get", "small") < 4 * MIB
    assert peak("put", "big") - peak("put", "small") < 4 * MIB


def test_file_that_the_disk_here_can_not_hold_takes_no_room_from_the_others(lone, work):
    files = {"big": content(300000), "small": b"hello"}
    fill(lone.download, files)
    patch = "import shutil, types\nshutil.disk_usage = lambda path: types.SimpleNamespace(free=%d, total=400000)"
    for options in ([], ["--no-verify"], ["--classic"]):
        done = client(lone, "get", "big", "small", *options, cwd=work, patch=patch % 299999)
        assert done.code == 1 and done.err.startswith("big: no room here for 300000 bytes\n")
        assert tree(work, hidden=True) == {"small": b"hello"}
    fill(work, {partial_name("big"): files["big"][:1000]})
    assert client(lone, "get", "big", cwd=work, patch=patch % 299000).code == 0 and tree(work) == files


@pytest.mark.parametrize("options", [[], ["--classic"]], ids=["framed", "classic"])
def test_room_is_asked_of_the_folder_that_the_file_goes_to(lone, work, options):
    fill(lone.download, {"big": content(300000)})
    patch = "import os, shutil, types\nshutil.disk_usage = lambda path: types.SimpleNamespace(free=os.stat(path) and %s, total=1)"
    full = client(lone, "get", "big", "-o", "full/big", *options, cwd=work, patch=patch % "path != 'full' and 1e9")
    assert full.code == 1 and "no room" in full.err
    assert client(lone, "get", "big", "-o", "new/big", *options, cwd=work, patch=patch % "path == 'new' and 1e9").code == 0


@in_all_modes_at_once
def test_disk_that_does_not_tell_its_room_takes_files(mode, folder):
    patch, data = "import shutil, types\nshutil.disk_usage = lambda path: types.SimpleNamespace(free=0, total=0)", content(300000)
    fill(folder / "work", {"x": data})
    with serve(mode, folder, patch=patch) as server:
        server.serves("y", data)
        for command in ("put x", "get y"):
            assert client(server, *command.split(), cwd=folder / "work", patch=patch).code == 0
        assert server.uploads() == {"x": data} and tree(folder / "work") == {"x": data, "y": data}


@posix
def test_partial_of_another_user_is_not_taken_where_it_could_be_changed_later(lone, work):
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    lone.serves("x", b"hello")
    fill(work, {partial_name("x"): b""})
    os.chown(str(work / partial_name("x")), 65534, 65534)
    work.chmod(0o1777)          # as /tmp: here each may remove and rename their own only
    done = client(lone, "get", "x", cwd=work)
    assert done.code == 1 and tree(work) == {}
    assert done.err in ("x: %s is another user's\n" % partial_name("x"),
                        "x: this folder: Permission denied\n")  # the system's own rule, see fs.protected_regular in proc(5)
    os.chown(str(work), 65534, 65534)  # who owns the folder can do that anyway
    assert client(lone, "get", "x", cwd=work).code == 0 and tree(work) == {"x": b"hello"}


# ==== Command line: the client, against a hostile server ============================================================

OK_GET = {"ok": True, "size": 10, "offset": 0, "mtime": 0}


def wired(*parts):
    return b"".join(wire(part) for part in parts)


@at_once_for({
    "short payload": wired(OK_GET, b"12345"),
    "no last line": wired(OK_GET, b"1234567890"),
    "wrong digest": wired(OK_GET, b"1234567890", {"ok": True, "sha256": sha(b"another")}),
    "digest number": wired(OK_GET, b"1234567890", {"ok": True, "sha256": 5}),
    "no digest": wired(OK_GET, b"1234567890", {"ok": True, "sha256": None}),
    "error in the last line": wired(OK_GET, b"1234567890", {"ok": False, "code": "changed", "error": "changed"}),
    "last line not JSON": wired(OK_GET, b"1234567890", b"done\n"),
    "size negative": wired(dict(OK_GET, size=-1)),
    "size true": wired(dict(OK_GET, size=True), b"1"),
    "size float": wired(dict(OK_GET, size=10.0), b"1234567890", {"ok": True, "sha256": sha(b"1234567890")}),
    "size string": wired(dict(OK_GET, size="10"), b"1234567890"),
    "size 2**63": wired(dict(OK_GET, size=1 << 63), b"1234567890"),
    "size huge": b'{"ok":true,"size":' + b"9" * 60000 + b',"offset":0,"mtime":0}\n',
    "size missing": wired({"ok": True, "offset": 0}, b"1234567890"),
    "offset not asked for": wired(dict(OK_GET, offset=5), b"67890", {"ok": True, "sha256": sha(b"1234567890")}),
    "offset past the size": wired(dict(OK_GET, offset=11)),
    "ok a string": wired(dict(OK_GET, ok="true"), b"1234567890", {"ok": True, "sha256": sha(b"1234567890")}),
    "not JSON": b"hello there\n",
    "list": b"[1, 2, 3]\n",
    "deep": b'{"ok":' + b"[" * 60000 + b"\n",
    "endless line": b'{"ok":"' + b"x" * 200000,
    "nothing": b"",
    "code unknown": wired({"ok": False, "code": "frobbed", "error": "frobbed"}),
    "code missing": wired({"ok": False}),
    "code a list": wired({"ok": False, "code": ["x"], "error": {"x": 1}}),
})
def test_lying_get_is_an_error_and_leaves_nothing(answer, work):
    with fake_server(get=answer) as (port, headers):
        done = client(port, "get", "x", "--retries", "0", "--timeout", "5", cwd=work)
    assert done.code == 1 and done.err
    assert tree(work) == {}


def test_get_that_breaks_before_its_first_byte_leaves_no_hidden_file(work):
    with fake_server(get=wired(OK_GET)) as (port, headers):
        assert client(port, "get", "x", "--retries", "0", cwd=work).code == 1
    assert tree(work, hidden=True) == {}


def test_server_that_is_busy_is_asked_again(work):
    def get(peer, header):
        if asked_for(headers)["x"] == 1:
            peer.send({"ok": False, "code": "busy", "error": "too many are here"})
            raise Hangup
        get_ten(peer, header)

    with fake_server(get=get) as (port, headers):
        done = client(port, "get", "x", cwd=work, patch=NO_WAIT)
    assert done.code == 0 and "too many are here (busy)" in done.err
    assert tree(work, hidden=True) == {"x": b"1234567890"}


@linux
def test_file_that_has_more_bytes_than_its_size_tells_is_not_sent(lone, work):
    done = client(lone, "put", "/proc/self/status", cwd=work)
    assert (done.code, done.err) == (1, "status: the file changed while it was read: try again\n")
    assert lone.uploads() == {}


def test_whole_file_that_is_here_already_is_checked_to_the_end(work):
    fill(work, {"x": b"hello"})
    lie = wired({"ok": True, "size": 5, "offset": 5, "mtime": 0}, {"ok": True, "sha256": sha(b"other")})
    with fake_server(get=lie) as (port, headers):
        done = client(port, "get", "x", "--retries", "0", cwd=work)
    assert done.code == 1 and "SHA-256" in done.err
    assert tree(work, hidden=True) == {"x": b"hello"}


@at_once_for({
    "hash of other content": {"ok": True, "name": "x", "size": 5, "sha256": sha(b"other"), "duplicate": False},
    "no hash": {"ok": True, "name": "x", "size": 5, "sha256": None, "duplicate": False},
    "other size": {"ok": True, "name": "x", "size": 4, "sha256": sha(b"hello"), "duplicate": False},
    "error": {"ok": False, "code": "disk-full", "error": "no room"},
    "not an answer": {"ok": True},
    "close": b"",
})
def test_put_that_was_not_stored_whole_is_never_called_stored(answer, work):
    fill(work, {"x": b"hello"})
    resume = {"ok": True, "offset": 0, "sha256": sha(b"")}

    def put(peer, header):
        peer.read(header["size"] - header.get("offset", 0))
        peer.line()
        peer.send(answer)
        if answer == b"":
            raise Hangup

    with fake_server(put=put, resume=resume) as (port, headers):
        done = client(port, "put", "x", "--retries", "0", "--timeout", "5", cwd=work)
    assert [header["size"] for header in headers if header["cmd"] == "put"] == [5]
    assert done.code == 1 and ": stored" not in done.out


@cases("answer", {"past the end": {"ok": True, "offset": 300001, "sha256": sha(b"")},
                  "negative": {"ok": True, "offset": -1, "sha256": sha(b"")},
                  "another hash": {"ok": True, "offset": 200000, "sha256": sha(b"xyz")}})
def test_resume_that_does_not_match_starts_again_or_fails(work, answer):
    data, got = content(300000), []
    fill(work, {"x": data})

    def put(peer, header):
        got.append(peer.read(len(data) - header.get("offset", 0)))
        peer.line()
        peer.send({"ok": True, "name": "x", "size": len(data), "sha256": sha(data), "duplicate": False})

    with fake_server(put=put, resume=answer) as (port, headers):
        done = client(port, "put", "x", "--retries", "0", "--timeout", "5", cwd=work)
    assert "resume" in [header["cmd"] for header in headers]
    assert (done.code, got) in ((0, [data]), (1, []))


@at_once_for({repr(name): name for name in (
    "../evil", "/tmp/evil", "a/../../evil", "..", "", "a\\evil", "a\nevil", "evil\x1b[31m", "evil\0", "a//evil",
    "evil" * 99)})
def test_listing_with_an_evil_name_writes_nothing_elsewhere(name, folder):
    work = folder / "work"
    work.mkdir()
    listing = b"".join(wire({"name": name, "type": kind, "size": 3, "mtime": 0}) for kind in ("dir", "file"))
    listing += wire({"name": "good", "type": "file", "size": 3, "mtime": 0})

    def get(peer, header):
        peer.send({"ok": True, "size": 3, "offset": 0, "mtime": 0}, b"bad", {"ok": True, "sha256": sha(b"bad")})

    def ls(peer, header):
        first = b"" if header.get("path") else wire({"name": "folder", "type": "dir", "size": 0, "mtime": 0})
        peer.send({"ok": True, "size": len(first + listing)}, first, listing)

    with fake_server(ls=ls, get=get) as (port, headers):
        for arguments in (["get", "-r", "folder"], ["get", "*"]):
            done = client(port, *arguments, "--retries", "0", "--timeout", "5", cwd=work)
            assert done.code == 1 and "left out" in done.err
    assert (work / "folder" / "good").read_bytes() == (work / "good").read_bytes() == b"bad"
    assert all("evil" not in found for found in tree(folder, hidden=True))
    assert os.listdir(str(folder)) == ["work"]


def test_line_of_a_listing_that_is_too_long_is_left_out(work):
    lines = b"[" * 70000 + b"\n\n" + wire({"name": "good", "type": "file", "size": 3, "mtime": 0})
    with fake_server(ls=wired({"ok": True, "size": len(lines)}, lines)) as (port, headers):
        done = client(port, "ls", cwd=work)
    assert done.code == 1 and "good" in done.out and done.err == "a line of the listing is left out: 70001 bytes\n"


def test_what_a_server_says_never_reaches_the_terminal_raw(work):
    evil = "\x1b]0;owned\x07\x1b[2J\r\x9b31m\x08 evil"
    listing = wire({"name": evil, "type": "file", "size": 3, "mtime": 0})
    fill(work, {"x": b"hello"})
    error = {"ok": False, "code": evil, "error": evil}

    def put(peer, header):
        peer.read(header["size"] - header.get("offset", 0))
        peer.line()
        peer.send({"ok": True, "name": evil, "size": 5, "sha256": sha(b"hello"), "duplicate": False})

    with fake_server(get=error, ls=lambda peer, header: peer.send({"ok": True, "size": len(listing)}, listing), put=put,
                     resume={"ok": True, "offset": 0, "sha256": sha(b"")}) as (port, headers):
        for command in (["ls"], ["get", "x"], ["put", "x"]):
            done = client(port, *command, "--retries", "0", cwd=work)  # run() refuses control characters
            assert "evil" in done.out + done.err
    hello = dict(HELLO, server=evil, version=evil, mode=evil)
    with fake_server(hello=hello, ls={"ok": False, "code": "x", "error": evil}) as (port, headers):
        client(port, "ls", cwd=work)
        client(port, cwd=work, given="ls\n")


@at_once_for({
    "FTP": {"hello": b"220 Welcome\r\n" * 3}, "HTTP": {"hello": b"HTTP/1.1 400 Bad Request\r\n\r\n"},
    "noise": {"hello": b"\xff" * 100}, "half a hello": {"hello": b"{"},
    "endless listing": {"ls": wired({"ok": True, "size": 1 << 62}, b"x" * 100000)},
    "line of a megabyte": {"ls": wired({"ok": True, "size": MIB + 1}, b"x" * MIB, b"\n")},
    "cut listing": {"ls": wired({"ok": True, "size": 999}, {"name": "x", "type": "file", "size": 3, "mtime": 0})},
})
def test_server_of_another_kind_is_an_error(answers, work):
    with fake_server(**answers) as (port, headers):
        done = client(port, "ls", "--retries", "0", "--timeout", "5", cwd=work)
    assert done.code == 1 and done.err


def test_listing_need_not_tell_times(work):
    line = b'{"name": "a", "type": "file", "size": 1}\n'
    with fake_server(ls=lambda peer, header: peer.send({"ok": True, "size": len(line)}, line)) as (port, headers):
        done = client(port, "ls", cwd=work)
    assert done.code == 0 and re.search(r"1 .* a$", done.out, re.MULTILINE)


def test_listing_without_an_end_is_not_taken_into_memory(work):
    patch, given = "import ftp_client; ftp_client.LISTING_LIMIT = 1000", listing(*["x"] * 50)
    with fake_server(ls=lambda peer, header: peer.send(given)) as (port, headers):
        done = client(port, "ls", cwd=work, patch=patch)
    assert done.code == 1 and "a listing of" in done.err and done.out == ""
    assert ftp_client.LISTING_LIMIT <= GIB


@linux
def test_listing_of_rubbish_takes_no_more_memory_than_others(work):
    def peak(listing):
        with fake_server(ls=wired({"ok": True, "size": len(listing)}, listing)) as (port, headers):
            return int(client(port, "ls", cwd=work, patch=TELL_PEAK).out.split()[-1]) * KIB

    before = peak(b"")
    assert peak(b"\n" * 4 * MIB) - before < 16 * MIB
    assert peak(b"x\n" * 64 * KIB) - before < 4 * MIB


@early
def test_refusal_of_a_server_that_takes_no_more_is_shown(work):
    fill(work, {"x": content(20 * MIB)})
    told = threading.Event()

    def put(peer, header):
        time.sleep(0.5)  # until nothing more fits on the way
        peer.send({"ok": False, "code": "disk-full", "error": "no room"})
        told.wait(PATIENCE)

    with fake_server(resume={"ok": True, "offset": 0, "sha256": sha(b"")}, put=put) as (port, headers):
        done = client(port, "put", "x", "--timeout", str(PATIENCE), "--retries", "0", cwd=work)
        told.set()
    assert done.code == 1 and "no room (disk-full)" in done.err


@early
def test_server_that_hashes_for_longer_than_the_time_limit_is_waited_for(work):
    data = content(1000)
    fill(work, {partial_name("x"): data})

    def get(peer, header):
        time.sleep(4)
        peer.send({"ok": True, "size": 1000, "offset": 1000, "mtime": 0}, {"ok": True, "sha256": sha(data)})

    with fake_server(get=get) as (port, headers):
        done = client(port, "get", "x", "--timeout", "3", "--retries", "0", cwd=work,
                      patch="import ftp_client; ftp_client.WORK_RATE = 200")
    assert done.code == 0 and tree(work) == {"x": data}


@linux
@early
def test_server_that_takes_little_at_a_time_is_not_given_up(work):
    data, got = content(4 * MIB), []
    fill(work, {"x": data})

    def resume(peer, header):
        peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * KIB)
        peer.send({"ok": True, "offset": 0, "sha256": sha(b"")})

    def put(peer, header):
        for _ in range(120):
            got.append(peer.read(4 * KIB))
            time.sleep(0.08)
        peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, MIB)
        got.append(peer.read(len(data) - len(b"".join(got))))
        peer.line()
        peer.send({"ok": True, "name": "x", "size": len(data), "sha256": sha(b"".join(got)), "duplicate": False})

    with fake_server(resume=resume, put=put) as (port, headers):
        done = client(port, "put", "x", "--timeout", "4", "--retries", "0", cwd=work)
    assert done.code == 0 and b"".join(got) == data


def hello_once():
    """A script that welcomes one connection and hangs up on all others."""
    answers = [HELLO]

    def hello(peer, header):
        if not answers:
            raise Hangup
        peer.send(answers.pop())

    return hello


def test_server_that_reads_no_more_and_says_so_is_noticed_at_once(work):
    fill(work, {"d/%02d" % number: content(200000, number) for number in range(60)})
    ended = threading.Event()

    def put(peer, header):
        peer.send({"ok": True, "name": header["name"], "size": header["size"], "sha256": None, "duplicate": False})
        peer.sock.shutdown(socket.SHUT_WR)  # and the connection stays: only the end of its stream tells
        ended.wait(4 * PATIENCE)

    with fake_server(put=put, hello=hello_once()) as (port, headers):
        try:
            done = client(port, "put", "-r", "d", "--no-verify", "--retries", "0", "--timeout", str(4 * PATIENCE), cwd=work)
        finally:
            ended.set()
    assert done.code == 1 and done.out == "d/00: stored as d/00\n"
    assert done.err.startswith("d/01: given up: the server closed the connection\n")


@early
def test_server_that_reads_nothing_and_says_a_little_again_and_again_is_given_up(work):
    fill(work, {"d/%02d" % number: content(200000, number) for number in range(60)})
    ended = threading.Event()

    def put(peer, header):
        while not ended.wait(0.1):
            peer.sock.sendall(b" ")

    with fake_server(put=put, hello=hello_once()) as (port, headers):
        try:
            done = client(port, "put", "-r", "d", "--retries", "0", "--timeout", "3", cwd=work,
                          patch="import ftp_client; ftp_client.HEADER_TIME = 1")
        finally:
            ended.set()
    assert done.code == 1 and done.err.startswith("d/00: given up: ")


def test_classic_server_that_has_the_file_no_more_is_not_waited_for(work):
    with listen() as listener, ThreadPoolExecutor(1) as pool:
        def talk():
            with Peer(listener.accept()[0]) as peer:
                assert peer.read(7) == b"get|x|0"
                peer.send(b"YES|1000")
                assert peer.read(13) == b"second_active"
                peer.send(b"half of it")
            with Peer(listener.accept()[0]) as peer:
                assert peer.read(7) == b"get|x|0"
                peer.send(b"NO|0")
                assert peer.closed()
        talking = pool.submit(talk)
        done = client(listener.getsockname()[1], "--classic", "get", "x", cwd=work, patch="import ftp_client; ftp_client.FIRST_PAUSE = 0.1")
        talking.result(PATIENCE)
    assert done.code == 1 and done.err.endswith("x: the server has no such file\n")


@early
def test_classic_answer_in_pieces_is_one_answer(work):
    with listen() as listener, ThreadPoolExecutor(1) as pool:
        def talk():
            with Peer(listener.accept()[0]) as peer:
                assert peer.read(7) == b"get|x|0"
                peer.dribble(b"YES|10", 0.1)
                assert peer.read(13) == b"second_active"
                peer.send(b"1234567890")
        talking = pool.submit(talk)
        done = client(listener.getsockname()[1], "--classic", "get", "x", cwd=work, patch="import ftp_client; ftp_client.QUIET_TIME = 3")
        talking.result(PATIENCE)
    assert done.code == 0 and tree(work) == {"x": b"1234567890"}


@posix
@early
def test_connection_that_the_server_has_ended_while_idle_is_made_again_without_a_word(folder):
    with serve("selectors", folder, "--timeout", "3") as server:
        server.serves("x", b"hello")
        done = client(server, "--retries", "0", cwd=folder, given="ls\n!sleep 6\nls\n")
    assert (done.code, done.err) == (0, "") and done.out.count("x\n") == 2


@pytest.mark.parametrize("answer, pause, options, told", [
    (b"NO|1", 0, [], ["<- NO|1", "x: the server answered nonsense"]),
    (b"\x1b", 0, [], ["<- \\x1b", "x: the server answered nonsense"]),
    (b"YE", 0.1, [], ["<- YE", "x: the server answered nonsense"]),
    (b"YE", 0, ["--timeout", "3"], ["<- YE", "x: the server answered nonsense"]),
    (b"", 0, [], ["x: the server hung up: it refuses that, or it is no ftp_server.py"]),
], ids=["none", "no text", "never whole", "silent", "no answer"])
@early
def test_classic_answer_that_is_none_is_told_at_once(work, answer, pause, options, told):
    with listen() as listener, ThreadPoolExecutor(1) as pool:
        def talk():
            with Peer(listener.accept()[0]) as peer:
                assert peer.read(7) == b"get|x|0"
                peer.dribble(answer, pause)
                assert not answer or peer.closed()
        talking = pool.submit(talk)
        done = client(listener.getsockname()[1], "--classic", "--explain", "get", "x", *options, cwd=work,
                      patch="import ftp_client; ftp_client.HEADER_TIME = %d" % (60 if options else 3))
        talking.result(PATIENCE)
    assert done.code == 1 and done.err.splitlines() == ["-> get|x|0"] + told


@pytest.mark.parametrize("command, answer, code, told", [
    ("get", b"NO|0", 1, "x: the server has no such file\n"), ("put", b"OK", 0, ""),
], ids=["NO", "OK"])
def test_classic_answer_counts_though_the_server_closes_behind_it(work, command, answer, code, told):
    if command == "put":
        fill(work, {"x": b""})
    with raw_server([answer]) as port:
        done = client(port, "--classic", command, "x", cwd=work)
    assert (done.code, done.err) == (code, told)


def test_what_was_under_way_when_the_line_broke_is_asked_about_first(work):
    got = []

    def put(peer, header):
        got.append(header["name"])
        peer.read(header["size"] - header["offset"] if "offset" in header else header["size"])
        last = peer.line()
        if len(got) == 2:
            raise Hangup
        if len(got) > 2:
            peer.send({"ok": True, "name": header["name"], "size": header["size"], "sha256": last["sha256"], "duplicate": False})

    fill(work, {name: content(50000, number) for number, name in enumerate("ab")})
    with fake_server(put=put, resume={"ok": True, "offset": 0, "sha256": sha(b"")}) as (port, headers):
        done = client(port, "put", "a", "b", cwd=work, patch="import ftp_client; ftp_client.FIRST_PAUSE = 0.1")
    assert done.code == 0
    assert [header["cmd"] for header in headers] == ["hello", "put", "put", "hello", "resume", "put", "resume", "put"]


@early
def test_answer_that_comes_too_late_is_not_taken_for_the_next_one(work):
    fill(work, {"x": b"hello"})
    patch, asked = "import ftp_client; ftp_client.FIRST_PAUSE = 0.1", []

    def late(peer, header):
        asked.append(peer)
        if len(asked) == 2:  # the first is broken off by put; this one is silent for longer than the client waits
            peer.line()
        peer.send(HELLO)

    def put(peer, header):
        if len(asked) == 1:
            raise Hangup
        peer.read(5)
        peer.line()
        peer.send({"ok": True, "name": "x", "size": 5, "sha256": sha(b"hello"), "duplicate": False})

    with fake_server(late, put=put) as (port, headers):
        done = client(port, "put", "x", "--retries", "3", "--timeout", "3", cwd=work, patch=patch)
    assert done.code == 0 and "stored as x" in done.out
    assert len(asked) == 3


@early
def test_server_that_falls_silent_is_given_up_and_a_slow_one_is_not(work):
    def silent(peer, header):
        peer.send(OK_GET, b"12345")
        assert peer.closed()
        raise Hangup

    def dripping(peer, header):
        while True:
            peer.dribble(" ", 0.05)

    def mute(peer, header):
        if header["cmd"] == "put":
            peer.read(header["size"])
            peer.line()
        assert peer.closed()
        raise Hangup

    def slow(peer, header):
        peer.send(OK_GET)
        peer.dribble(b"1234567890", 0.6)
        peer.send({"ok": True, "sha256": sha(b"1234567890")})

    def ask(script, *command, timeout=4):
        start = time.monotonic()
        with fake_server(**{command[0]: script}) as (port, headers):
            done = client(port, *command, "--retries", "0", "--timeout", str(timeout), cwd=work, patch=patch)
        assert time.monotonic() - start < 3 * timeout
        return done.err.strip() or done.code

    patch = "import ftp_client; ftp_client.HEADER_TIME = 3"
    fill(work, {"small": b"hello"})
    assert at_once(
        lambda: ask(silent, "get", "x"),
        lambda: ask(dripping, "get", "y", timeout=5),
        lambda: ask(mute, "get", "w", timeout=6),
        lambda: ask(mute, "put", "small", timeout=6),
        lambda: ask(mute, "ls", timeout=6),
        lambda: ask(slow, "get", "z"),
    ) == ["x: given up: nothing moved for 4 seconds", "y: given up: a header was not complete in 3 seconds",
          "w: given up: nothing moved for 6 seconds", "small: given up: nothing moved for 6 seconds",
          "given up: nothing moved for 6 seconds", 0]
    assert tree(work) == {"small": b"hello", "z": b"1234567890"}


# ==== Command line: the client, classic dialect =====================================================================


@early
def test_classic_client_works_with_the_articles_server(folder):
    files = {"a": content(500000), "b.txt": b"first line\nsecond line", "c.bin": content(5000), "d": content(1)}
    work = os.path.dirname(fill(folder / "work", files))
    with article_server(folder / "article") as port:
        fill(folder / "article" / "download", {"down.txt": b"one\ntwo\n" * 100, "empty": b""})
        done = client(port, "--classic", "get", "down.txt", "empty", cwd=work)
        assert done.code == 0 and tree(work) == dict(files, **{"down.txt": b"one\ntwo\n" * 100, "empty": b""})
        assert client(port, "get", "nothing", "--classic", cwd=work).code == 1
        done = client(port, "--classic", "put", *files, cwd=work)
        assert done.code == 0 and "sent" in done.out and ": stored" not in done.out
        wait_for(lambda: tree(folder / "article" / "upload") == files)


def test_client_falls_back_where_hello_is_met_by_a_hang_up(tmp_path, work):
    fill(work, {"x": b"hello"})
    with article_server(tmp_path / "article") as port:
        fill(tmp_path / "article" / "download", {"y": b"there"})
        done = client(port, "put", "x", cwd=work)
        assert done.code == 0 and "sent" in done.out
        wait_for(lambda: tree(tmp_path / "article" / "upload") == {"x": b"hello"})
        assert client(port, "get", "y", cwd=work).code == 0
    assert tree(work) == {"x": b"hello", "y": b"there"}


def test_prompt_takes_no_server_for_a_classic_one_that_has_never_said_a_word(work):
    greeted = []

    def hang_up_once(peer, header):
        greeted.append(peer)
        if len(greeted) == 1:
            raise Hangup
        peer.send(HELLO)

    with fake_server(hello=hang_up_once, ls=wired({"ok": True, "size": 0})) as (port, headers):
        done = client(port, cwd=work, given="ls\nls\n")
    assert "speaking the classic dialect" in done.err and done.err.count("can't list") == 1
    assert [header["cmd"] for header in headers] == ["hello", "hello", "ls"]


@pytest.mark.parametrize("verb", ["put", "get"])
def test_prompt_keeps_to_the_dialect_of_a_classic_server(tmp_path, work, verb):
    fill(work, {"x": b"hello", "y": b"there"})
    fill(tmp_path / "article" / "download", {"x": b"hello", "y": b"there"})
    with article_server(tmp_path / "article") as port:
        done = client(port, cwd=work, given="{0} x\n{0} y\n".format(verb))
    assert done.err.count("speaking the classic dialect") == 1 and "2 of 2" not in done.err


def test_prompt_keeps_to_the_classic_dialect_that_was_asked_for(work):
    with fake_server() as (port, headers):
        done = client(port, "--classic", cwd=work, given="ls\nget -r .\n")
    assert done.err == "the classic dialect can't list\n.: the classic dialect can't list\n" and not headers


@posix
def test_prompt_forgets_the_dialect_after_ctrl_c_too(work):
    silent = threading.Event()

    def talk(listener):
        listener.accept()[0].close()
        with Peer(listener.accept()[0]) as peer:        # a classic connection, at once
            assert peer.read(7) == b"get|x|0"
            silent.set()
            assert peer.closed()
        with Peer(listener.accept()[0]) as peer:
            assert peer.line() == {"cmd": "hello"}
            peer.send(HELLO)
            assert peer.line()["cmd"] == "ls"
            peer.send({"ok": True, "size": 0})
            assert peer.closed()

    with listen() as listener, ThreadPoolExecutor(1) as pool:
        talking = pool.submit(talk, listener)
        process = subprocess.Popen(PYTHON + [CLIENT, "127.0.0.1", str(listener.getsockname()[1])], cwd=str(work), env=ENVIRONMENT,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        process.stdin.write(b"get x\n")
        process.stdin.flush()
        assert silent.wait(PATIENCE)
        process.send_signal(signal.SIGINT)
        err = process.communicate(b"ls\n", timeout=PATIENCE)[1]
        talking.result(PATIENCE)
    assert process.returncode == 0 and b"can't list" not in err


@cases("patch", {"as it is": "", "without sendfile": "import os; vars(os).pop('sendfile', None)"})
def test_classic_client_works_with_our_server(server, work, patch):
    files = {unique(): content(size) for size in (0, 5, 600000)}
    fill(work, files)
    done = client(server, "--classic", "put", *files, cwd=work, patch=patch)
    assert done.code == 0 and ": stored" not in done.out
    wait_for(lambda: all(server.stored(name) == data for name, data in files.items()))
    down = unique()
    server.serves(down, content(70000))
    assert client(server, "--classic", "get", down, cwd=work).code == 0
    assert tree(work, hidden=True) == dict(files, **{down: content(70000)})


@contextlib.contextmanager
def raw_server(*connections):
    """Accept connections in turn; send the next of each one's answers whenever something arrives, then close it."""
    def talk():
        for answers in connections:
            with listener.accept()[0] as conn:
                for answer in answers:
                    conn.recv(1024)
                    conn.sendall(answer)

    with listen() as listener, ThreadPoolExecutor(1) as pool:
        talking = pool.submit(talk)
        yield listener.getsockname()[1]
        shut(listener)
        with contextlib.suppress(OSError):
            talking.result(PATIENCE)


@cases("arguments, connections", {
    "classic get that is cut": (["--classic"], [[b"YES|1000", b"x" * 999]]),
    "a hang-up after some bytes is no classic server": ([], [[b"{"], [b"YES|1", b"x"]]),
})
def test_classic_get_that_is_none_leaves_nothing(work, arguments, connections):
    with raw_server(*connections) as port:
        done = client(port, *arguments, "get", "x", "--retries", "0", "--timeout", "5", cwd=work)
    assert done.code == 1 and tree(work) == {}


# ==== Prompt: through a pipe and through a terminal =================================================================


def test_prompt_through_a_pipe(lone, work):
    fill(work, {"a b.txt": b"ab", "c.txt": b"c", "sub/d.txt": b"d"})
    fill(lone.download, {"there is.txt": b"it"})
    commands = ["put \"a b.txt\" 'c.txt'", "frob", "put", 'put "open', "ls", "get 'there is.txt'", "lls", "lcd sub",
                "put d.txt", "lls", "!echo shelly", "help", "?", "help put", "", "   ", "get missing", "exit()",
                "put never.txt"]
    done = client(lone, cwd=work, given="\n".join(commands) + "\n")
    assert done.code == 0 and ">>>" in done.out
    assert lone.uploads() == {"a b.txt": b"ab", "c.txt": b"c", "d.txt": b"d"}
    assert (work / "there is.txt").read_bytes() == b"it"
    everything = done.out + done.err
    assert done.out.count("\nput FILE") + done.out.count(">>>put FILE") == 3 and re.search(r"\b1  .* c\.txt", done.out)
    for word in ("frob", "there is.txt", "shelly", "missing", "d.txt"):
        assert word in everything
    assert "never.txt" not in everything


@linux
def test_prompt_ends_quietly_where_nothing_can_be_printed(lone, work):
    command = " ".join(map(shlex.quote, launch(CLIENT) + [lone.host, str(lone.port)]))
    for sink in ("| head -n 1", "> /dev/full"):
        done = run(["sh", "-c", "printf 'ls\\nls\\nls\\n' | %s %s" % (command, sink)], work)   # run() looks for a traceback
        assert "Errno" not in done.err, done


@linux
def test_listing_that_cannot_be_printed_is_a_failure(lone, work):
    lone.serves("x", b"hello")
    command = " ".join(map(shlex.quote, launch(CLIENT) + [lone.host, str(lone.port), "ls"]))
    assert run(["sh", "-c", command + " > /dev/full"], work) == (1, "", "No space left on device\n")


def test_word_that_ends_a_session_may_be_the_command(work):
    assert client(1, "exit", cwd=work) == client(1, "quit", cwd=work) == (0, "", "")
    assert client(1, "exit", "now", cwd=work).code == 2


def test_ctrl_c_when_all_is_done_is_no_traceback(lone, work):
    patch = "import ftp_client\ndef close(self): raise KeyboardInterrupt\nftp_client.FtpClient.close = close"
    done = client(lone, "ls", cwd=work, patch="import warnings; warnings.simplefilter('ignore'); " + patch)
    assert done == (130, "", "stopped\n")


def test_ctrl_c_at_the_prompt_leaves_no_connection_over_which_a_late_answer_may_come(monkeypatch):
    def interrupted(client, words):
        raise KeyboardInterrupt

    typed, closed = ["ls"], []
    monkeypatch.setattr("builtins.input", lambda prompt: typed.pop() if typed else sys.exit())
    monkeypatch.setattr(ftp_client, "set_up_readline", lambda client: None)
    monkeypatch.setattr(ftp_client, "run_command", interrupted)
    with pytest.raises(SystemExit):
        ftp_client.command_fanout(types.SimpleNamespace(known=True, close=lambda: closed.append(True),
                                                             stopped=lambda: "stopped"))
    assert closed == [True]


@posix
def test_ctrl_c_in_a_shell_command_that_is_the_command(work):
    for command in ("!kill -INT $$", "!exit 130"):  # the latter is what a shell says of a command that it ended
        assert client(1, command, cwd=work) == (130, "", "stopped\n")


def test_shell_command_may_be_the_command(work):
    assert client(1, "!echo", "shelly", cwd=work) == (0, "shelly\n", "")
    assert client(1, "!exit 3", cwd=work) == (1, "", "")


@at_once_for({"exit()": "exit()\n", "exit": "exit\n", "quit": "quit\n", "bye": "bye\n", "Ctrl-D": ""})
def test_words_that_end_the_session(typed, work, lone_shared):
    assert client(lone_shared, cwd=work, given=typed).code == 0


def test_bad_command_is_one_line_and_the_prompt_goes_on(lone, work):
    def lines(*commands):
        done = client(lone, cwd=work, given="".join(command + "\n" for command in commands + ("ls",)))
        assert done.code == 0
        return (done.out + done.err).count("\n")

    plain = lines()
    for command in ("frob", "put", "get", "get -z x", "ls a b c", 'put "x', "lcd missing", "help frob", "put missing"):
        assert lines(command) == plain + 1, command


def test_number_signs_start_no_comment_and_lcd_alone_goes_home(lone, work):
    fill(work, {"home/a#b": b"1", "home/#c": b"2"})
    done = client(lone, cwd=work, given="lcd\nput a#b #c\n", environment={"HOME": str(work / "home"), "USERPROFILE": str(work / "home")})
    assert done.code == 0 and lone.uploads() == {"a#b": b"1", "#c": b"2"}


def test_windows_paths_work_unquoted(lone, work):
    if os.name == "nt":
        fill(work, {"sub/x.txt": b"x"})
        assert client(lone, cwd=work, given="put sub\\x.txt\n").code == 0
        assert lone.uploads() == {"x.txt": b"x"}
    else:
        fill(work, {"back\\slash": b"x"})
        done = client(lone, cwd=work, given="put back\\slash\n")
        assert "bad-name" in done.err or "backslash," in done.err  # no such name can travel, and one line says so
        assert lone.uploads() == {}


@posix
def test_line_with_a_nul_or_no_input_at_all_is_one_line(lone, work):
    done = client(lone, cwd=work, given="lcd a\0b\n!echo a\0b\nput a\0b\nls\0\nls\nexit()\n")
    assert done.code == 0 and len(done.err.strip().split("\n")) == 4
    command = " ".join(map(shlex.quote, PYTHON + [CLIENT, "127.0.0.1", str(lone.port)]))
    for closed in ("<&-", ">&-"):
        done = run(["sh", "-c", command + " " + closed], work)
        assert done.code == 2 and "name a command" in done.err


def test_prompt_works_without_readline(lone, work):
    fill(work, {"x": b"x"})
    done = client(lone, cwd=work, given="put x\nls\n", patch="import sys; sys.modules['readline'] = None")
    assert done.code == 0 and lone.uploads() == {"x": b"x"}


def test_prompt_survives_a_server_that_restarts(mode, tmp_path, work):
    fill(work, {"x": b"x"})
    with serve(mode, tmp_path) as server:
        port = server.port
        process = subprocess.Popen(PYTHON + [CLIENT, "127.0.0.1", str(port)], cwd=str(work), stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=ENVIRONMENT)
        process.stdin.write(b"put x\n")
        process.stdin.flush()
        wait_for(lambda: server.stored("x"))
    with process, serve(mode, tmp_path, port=port) as server:
        fill(work, {"y": b"y"})
        out = process.communicate(b"put y\n", timeout=PATIENCE)[0]
        assert process.returncode == 0 and b"Traceback" not in out
        assert set(server.uploads()) == {"x", "y"}


class Terminal:
    """A client on a pseudo-terminal of some columns: type() to it, expect() what it shows."""

    # The client is not the leader of its session: what it shows last is lost when a leader ends.
    LEADER = """
import fcntl, signal, subprocess, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, lambda *arguments: None)  # Ctrl-C is for the client
print("exit code %d." % subprocess.call(sys.argv[1:]), flush=True)
signal.pause()
"""

    def __init__(self, port, folder, *arguments, columns=80):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        environment = {name: value for name, value in ENVIRONMENT.items() if name not in ("COLUMNS", "LINES")}
        command = [sys.executable, "-c", self.LEADER] + PYTHON + [CLIENT, "127.0.0.1", str(port)] + list(arguments)
        self.process = subprocess.Popen(command, cwd=str(folder), stdin=slave, stdout=slave, stderr=slave,
                                        start_new_session=True, env=dict(environment, TERM="xterm", HOME=str(folder)))
        os.close(slave)
        self.bytes, self.seen = b"", 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait(PATIENCE)
        os.close(self.master)

    def type(self, text):
        os.write(self.master, text.encode("utf-8"))

    @property
    def shown(self):
        return self.bytes.decode("utf-8", "replace")

    def wait_for(self, condition):
        """Take what the terminal shows until condition() is true."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, "waited in vain, after %r" % self.shown[self.seen:]
            if select.select([self.master], [], [], 0.02)[0]:
                self.bytes += os.read(self.master, 65536)

    def expect(self, text):
        """Wait until text is shown, after what was expected before."""
        self.wait_for(lambda: text in self.shown[self.seen:])
        self.seen = self.shown.index(text, self.seen) + len(text)

    def interrupt(self):
        """Press Ctrl-C, each second, until there is a new prompt: input() overlooks one just before it waits for keys."""
        due = time.monotonic()

        def prompted():
            nonlocal due
            if time.monotonic() >= due:
                self.type("\x03")
                due += 1
            return ">>>" in self.shown[self.seen:]

        self.wait_for(prompted)

    def end(self):
        """Wait for the client's end; return its exit code."""
        self.expect("exit code ")
        self.expect(".")
        assert "Traceback" not in self.shown
        return int(re.search(r"exit code (\d+)\.", self.shown).group(1))


def width(text):
    """Return how many columns of a terminal a text takes."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else not unicodedata.combining(char) for char in text)


@terminal
def test_prompt_on_a_terminal(lone, work):
    fill(work, {"x": b"x"})
    with Terminal(lone.port, work) as term:
        term.expect(">>>")
        term.type("put x\r")
        term.expect("x")
        term.expect(">>>")
        assert lone.uploads() == {"x": b"x"}
        term.type("lls\r")
        term.expect(">>>")
        term.interrupt()
        term.type("\x04")
        assert term.end() == 0


@terminal
def test_ctrl_c_ends_the_transfer_and_not_the_session(lone, work):
    sparse(os.path.join(lone.download, "big"), 64 * MIB)
    lone.serves("small", b"small")
    with Proxy(lone.port, hold=("down", MIB), pause=0.05) as proxy, Terminal(proxy.port, work) as term:
        term.expect(">>>")
        term.type("get big\r")
        term.expect("%")
        term.type("\x03")
        term.expect(">>>")
        proxy.release()
        assert tree(work) == {}
        term.type("get small\r")
        term.expect("small")
        term.expect(">>>")
        term.type("exit()\r")
        assert term.end() == 0
    assert tree(work) == {"small": b"small"}


@terminal
def test_tab_completes_commands_local_names_and_remote_names(lone, work):
    fill(work, {"localfile.txt": b"up", "sub/inner.txt": b"inner"})
    fill(lone.download, {"remotefile.txt": b"down", "folder/deep.txt": b"deep", "folder/dee\u202ep": b"", "remote\x1b[2J": b""})
    pytest.importorskip("readline")
    with Terminal(lone.port, work) as term:
        term.expect(">>>")
        for typed, stored in (("pu\tloc\t\r", "localfile.txt"), ("put su\tinn\t\r", "inner.txt")):
            term.type(typed)
            term.wait_for(lambda: stored in lone.uploads())
        for typed, saved in (("get rem\t\r", "remotefile.txt"), ("get fol\tdee\t\r", "deep.txt")):
            term.type(typed)
            term.wait_for(lambda: saved in tree(work))
        term.type("\x1b[A\r")  # arrow up: the command before, from the history
        term.expect("deep.txt")
        term.type("exit()\r")
        assert term.end() == 0
    assert set(lone.uploads()) == {"localfile.txt", "inner.txt"}


@posix
@pytest.mark.parametrize("line, found", [
    ("put it", ["\"it's.txt\" "]), ("put q", ["'q\"t.txt' "]), ("put a", ["\"a b.txt\" "]),
    ("put \"a b", ["b.txt\" "]), ("put \"it's.txt\" q", ["'q\"t.txt' "]), ("put t", ["\"t\tab\" "]),
    ("put ~/s", ["~/sub/"]), ("put ~/sub/", ["~/sub/x "]), ("put it's", []),
])
def test_completed_names_can_be_used(work, monkeypatch, line, found):
    fill(work, {"it's.txt": b"", "q\"t.txt": b"", "a b.txt": b"", "t\tab": b"", "sub/x": b""})
    monkeypatch.chdir(str(work))
    monkeypatch.setenv("HOME", str(work))
    monkeypatch.setenv("USERPROFILE", str(work))
    text = line.rsplit(" ", 1)[1]
    assert ftp_client.completions(None, text, line) == found
    for name in found:
        words = ftp_client.split_words(line[:len(line) - len(text)] + name)
        assert name.endswith("/") or os.path.exists(os.path.expanduser(words[-1]))


@cases("name, offered", {
    "a screenshot on macOS": ("Shot 9.41\u202fAM.png", ["\"Shot 9.41\u202fAM.png\" "]), "wide space": ("S\u3000.txt", ["\"S\u3000.txt\" "]),
    "turned around": ("S\u202etxt.exe", []), "isolated": ("S\u2066x", []),
})
def test_completed_remote_names_can_not_command_the_terminal(name, offered):
    server = types.SimpleNamespace(ls_once=lambda folder: [{"name": name, "type": "file"}])
    assert ftp_client.completions(server, "S", "get S") == offered


@pytest.mark.parametrize("label", ["e\u0301" * 60, "成绩" * 60, "x" * 4000, "a\u0301"], ids=["NFD", "wide", "long", "short"])
@pytest.mark.parametrize("columns", [1, 5, 20, 79])
def test_progress_bar_keeps_its_numbers_whatever_the_name(label, columns):
    bar = ftp_client.Bar(1, 100, False)
    bar.done = 50
    text = bar.text(label, columns)
    assert width(text) <= columns
    assert " 50% 50 B"[:columns].rstrip() in text


@pytest.mark.parametrize("columns, shown", [(4, "x   "), (6, "x  50%"), (20, "x  50% 50.0 MB"), (24, "x  50% 50.0 MB 5.0 MB/s"),
                                            (79, "x  50% 50.0 MB 5.0 MB/s 0:10 left")])
def test_narrow_progress_bar_leaves_out_whole_facts(columns, shown):
    bar = ftp_client.Bar(1, 10 ** 8, False)
    bar.done = bar.moved = 5 * 10 ** 7
    bar.start = bar.drawn - 10
    assert bar.text("x", columns) == shown.strip()


def test_progress_bar_of_nothing_is_whole():
    assert ftp_client.Bar(1, 0, False).text("x", 79) == "x 100% 0 B 0 B/s"


def test_progress_bar_that_the_terminal_does_not_take_stops_no_transfer(monkeypatch):
    class FullTerminal:
        encoding, tries = "utf-8", 0

        def fileno(self):
            return 2

        def write(self, text):
            self.tries += 1
            raise BlockingIOError

    monkeypatch.setattr(sys, "stderr", FullTerminal())
    monkeypatch.setattr(os, "get_terminal_size", lambda fd: os.terminal_size((80, 24)))
    bar = ftp_client.Bar(1, 100, True)
    bar.add(ftp_client.Job(None, "x", 100), 100)
    bar.clear()
    assert sys.stderr.tries == 2


@terminal
@at_once_for({"%d columns" % columns: columns for columns in (12, 20, 40, 80, 200)})
def test_progress_bar_is_never_wider_than_the_terminal(columns, folder, lone):
    name, empty = "%s%d.bin" % ("成绩单很长的名字" * 4, columns), "empty%d" % columns
    data = content(8 * MIB)
    lone.serves(name, data)
    lone.serves(empty, b"")
    with Proxy(lone.port, hold=("down", 4 * MIB), pause=0.5) as proxy:
        with Terminal(proxy.port, folder, "get", name, empty, columns=columns) as term:
            term.expect("%")
            assert "100%" not in term.shown
            proxy.release()
            assert term.end() == 0
    pieces = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", term.shown))
    bars = [piece for piece in pieces if "%" in piece]
    assert bars and all(width(bar) <= columns for bar in bars), bars
    assert tree(folder) == {name: data, empty: b""}


@terminal
def test_progress_bar_shows_even_a_quick_transfer_to_its_end(lone, work):
    lone.serves("x", content(MIB))
    with Terminal(lone.port, work, "get", "x") as term:
        assert term.end() == 0
    assert re.search(r"\rx +100% 1\.0 MB", term.shown)


@terminal
def test_progress_bar_counts_many_files_as_a_whole(lone, work):
    fill(lone.download, {"d/x%d" % number: content(2 * MIB, number) for number in range(4)})
    with Proxy(lone.port, hold=("down", 7 * MIB), pause=0.5) as proxy, \
            Terminal(proxy.port, work, "get", "-r", "d") as term:
        term.wait_for(lambda: re.search(r"\b[89]\d\s*%", term.shown))
        proxy.release()
        assert term.end() == 0


def test_no_progress_bar_but_on_a_terminal(lone, work):
    lone.serves("x", content(MIB))
    done = client(lone, "get", "x", cwd=work)
    assert "\r" not in done.out + done.err and "%" not in done.err


# ==== SQL: every promise in db_notes.sql, checked on real engines ===================================================
# The notes (their head explains the notation) become steps; an engine takes them in order; what
# comes of each is held against its promise. SQLite is Python's own. MariaDB and PostgreSQL are
# private servers on loopback ports, spoken to through their command-line clients.

NOTES = os.path.join(HERE, "db_notes.sql")
SQL_ENGINES = ("sqlite", "mariadb", "postgresql")
ATTEMPT = re.compile(r"-- (try|student): (.*)")
PROMISED_ROW = re.compile(r"-- > (?:(%s): )?(.*)" % "|".join(SQL_ENGINES))
PROMISED_CODES = re.compile(r"-- ! (.*)")
POSTGRESQL_ONLY = "/* /* */ -- */"
STUDENT, STUDENT_PASSWORD = "db_notes_student", "Put-4-Get-2"   # the user that the notes create
SQL_CLIENT_TIMEOUT = 30     # seconds: a client that hangs is killed, and its step fails
DATABASE_TIMEOUT = 60   # seconds: for a server to come up, or to be gone, on a slow machine

# sql is a statement of the file ("file"), or what the reader is to type ("try", "student"); promises
# maps an engine, or "all", to a list of rows or to an error code.
Step = collections.namedtuple("Step", "line sql who promises")


def parse_notes(text):
    """Return the steps of the notes, in order."""
    steps, sql = [], ""
    for number, line in enumerate(text.splitlines(), 1):
        attempt = ATTEMPT.fullmatch(line)
        if attempt:
            steps.append(Step(number, attempt.group(2), attempt.group(1), {}))
        elif line.startswith(("-- > ", "-- ! ")):
            add_promise(steps[-1].promises, line)
        else:
            sql += line + "\n"
            if sqlite3.complete_statement(sql) or line.startswith(POSTGRESQL_ONLY):
                steps.append(Step(number, sql, "file", {}))
                sql = ""
    return steps


def add_promise(promises, line):
    """Add what one line promises: a row, for all engines or for one, or a code for each engine."""
    codes = PROMISED_CODES.fullmatch(line)
    if codes:
        for engine, code in (item.split() for item in codes.group(1).split(", ")):
            assert engine in SQL_ENGINES, line
            promises[engine] = code
    else:
        engine, row = PROMISED_ROW.fullmatch(line).groups()
        promises.setdefault(engine or "all", []).extend(read_rows([row], " | "))


def sql_cell(text):
    """Return a number as a Decimal, so that 3.5 and 3.5000 are equal; other text as it is."""
    try:
        return decimal.Decimal(text)
    except decimal.InvalidOperation:
        return text


def read_rows(lines, separator="\t"):
    return [[sql_cell(text) for text in line.split(separator)] for line in lines]


def promised(step, engine):
    """Return what step promises on engine: rows, a code, or None where it is not for this engine."""
    if step.who == "student" and engine == "sqlite":
        return None             # SQLite has no users
    unsaid = [] if step.who == "file" else None
    return step.promises.get(engine, step.promises.get("all", unsaid))


def play(dbms, steps):
    """Take the steps on an engine; return what came of each, rows or an error code, by line."""
    session = dbms.session()
    try:
        return {step.line: session.run(step.sql, step.who)
                for step in steps if promised(step, dbms.name) is not None}
    finally:
        session.close()


def broken(steps, engine, outcomes):
    """Return a line of text for each promise that the outcomes do not keep."""
    faults = []
    for step in steps:
        promise = promised(step, engine)
        outcome = outcomes.get(step.line)
        passed = promise == "ok" and isinstance(outcome, list)
        if promise != outcome and not passed:
            faults.append("%s, line %d: promised %s, got %s" % (engine, step.line, promise, outcome))
    return faults


# ---- Sessions: run(sql, who) returns rows or an error code ----

class SqliteSession:
    def __init__(self):
        self.db = sqlite3.connect(":memory:", isolation_level=None)

    def run(self, sql, who):
        try:
            return [[sql_cell("NULL" if value is None else str(value)) for value in row]
                    for row in self.db.execute(sql)]
        except sqlite3.Error as error:
            return type(error).__name__

    def close(self):
        self.db.close()


class SqlClient:
    """A command-line client kept running: statements go in, rows or an error code come out."""

    END = "-- end of answer --"

    def __init__(self, argv, print_end, error):
        self.print_end, self.error = print_end, re.compile(error)
        self.process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            encoding="utf-8", env=client_environment())

    def run(self, sql):
        watchdog = threading.Timer(SQL_CLIENT_TIMEOUT, self.process.kill)
        watchdog.start()
        try:
            self.process.stdin.write("%s\n%s\n" % (sql, self.print_end))
            self.process.stdin.flush()
            return self.read_answer()
        finally:
            watchdog.cancel()

    def read_answer(self):
        lines = []
        for line in iter(self.process.stdout.readline, self.END + "\n"):
            assert line, "the client ended: %s" % lines
            lines.append(line.rstrip("\n"))
        errors = [error.group(1) for error in map(self.error.match, lines) if error]
        return errors[0] if errors else read_rows(lines)

    def close(self):
        self.process.communicate()      # closes its stdin, at which it ends


class MariadbSession:
    def __init__(self, server):
        self.server = server
        self.clients = {"root": server.open_client("root")}

    def run(self, sql, who):
        if who != "student":
            return self.clients["root"].run(sql)
        if STUDENT not in self.clients:     # only now: the notes have created the user meanwhile
            self.clients[STUDENT] = self.server.open_client(STUDENT, STUDENT_PASSWORD)
        return self.clients[STUDENT].run(sql)

    def close(self):
        for client in self.clients.values():
            client.close()


class PostgresqlSession:
    def __init__(self, server):
        self.client = server.open_client()

    def run(self, sql, who):
        if who != "student":
            return self.client.run(sql)
        assert self.client.run("SET ROLE %s;" % STUDENT) == []
        outcome = self.client.run(sql)
        assert self.client.run("RESET ROLE;") == []
        return outcome

    def close(self):
        self.client.close()


# ---- Engines ----

def client_environment():
    """Return this process's environment without settings that redirect or translate the clients."""
    kept = {name: value for name, value in os.environ.items()
            if not name.startswith(("MYSQL", "MARIADB", "PG"))}
    return dict(kept, LC_ALL="C")


def find_program(name):
    """Return the path of a program, or None; servers are not always on a user's PATH."""
    versions = sorted(glob.glob("/usr/lib/postgresql/*/bin"),
                      key=lambda path: [int(number) for number in re.findall(r"\d+", path)])
    folders = versions[::-1] + [os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/libexec"]
    return shutil.which(name, path=os.pathsep.join(folders))


def database_account():
    """Return the uid and gid for servers: "nobody" instead of root, which they refuse; else None."""
    if os.geteuid() != 0:
        return None
    import pwd      # POSIX only, and so are the servers
    nobody = pwd.getpwnam("nobody")
    return nobody.pw_uid, nobody.pw_gid


def leashed(argv, death_signal):
    """Return the command that runs argv and ends with this process, however this process ends.

    The kernel sends the signal when the thread that started the command ends (PR_SET_PDEATHSIG): call
    this from the main thread. setpriv sets it last, since a change of user clears it; then sh makes
    sure that the parent did not end before that, when nothing would be sent any more.
    """
    setpriv = ["setpriv", "--pdeathsig", death_signal]
    if database_account():
        setpriv += ["--reuid=%d" % database_account()[0], "--regid=%d" % database_account()[1],
                    "--clear-groups"]
    still_there = ["sh", "-c", 'test "$PPID" = "$0" && exec "$@"', str(os.getpid())]
    return setpriv + still_there + argv


@contextlib.contextmanager
def database_folder():
    """Make a folder for a server, and remove it in the end."""
    account = database_account()    # which could not enter a folder inside one that is root's alone
    folder = tempfile.mkdtemp(prefix="ftp_sql_", dir="/tmp" if account else None)
    try:
        if account:
            os.chown(folder, *account)
        yield folder
    finally:
        shutil.rmtree(folder)


class Sqlite:
    name = "sqlite"

    def session(self):
        return SqliteSession()


class DatabaseServer:
    """A private database server with its data in folder, on a loopback port, leashed to us."""

    def __init__(self, folder):
        self.folder, self.data = folder, os.path.join(folder, "data")
        self.log = os.path.join(folder, "log")
        self.process = self.spawn(self.install())
        assert self.process.wait() == 0, self.read_log()
        for _ in range(5):      # another program may take the free port before the server does
            with listen() as probe:
                self.port = probe.getsockname()[1]
            self.process = self.spawn(self.serve())
            if self.answers():
                return
        pytest.fail("%s does not start: %s" % (self.name, self.read_log()))

    def spawn(self, argv):
        # MariaDB clears the folder for temporary files of other servers' tables: let it have its own.
        environment = dict(client_environment(), TMPDIR=self.folder)
        with open(self.log, "ab") as log:
            return subprocess.Popen(
                leashed(argv, self.death_signal), cwd=self.folder, env=environment,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def answers(self):
        """Wait until the server answers a client; return whether it does, and end it if not."""
        deadline = time.monotonic() + DATABASE_TIMEOUT
        while self.process.poll() is None and time.monotonic() < deadline:
            if self.ask("SELECT 1;", check=False) == "1\n":
                return True
            time.sleep(0.02)
        self.stop()
        return False

    def ask(self, sql, options=(), check=True):
        """Run sql in a client of its own, which stops at the first error; return what it prints."""
        asked = subprocess.run(
            self.client() + list(options), input=sql, env=client_environment(),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
        assert asked.returncode == 0 or not check, asked.stderr
        return asked.stdout

    def read_log(self):
        with open(self.log, encoding="utf-8", errors="replace") as log:
            return log.read()

    def stop(self):
        self.process.send_signal(getattr(signal, "SIG" + self.death_signal))
        self.process.wait()


class Mariadb(DatabaseServer):
    name = "mariadb"
    programs = ("mariadbd", "mariadb-install-db", "mariadb")
    apt = "apt-get install -y --no-install-recommends mariadb-server-core mariadb-client-core"
    death_signal = "KILL"
    small = ["--innodb-log-file-size=4M", "--innodb-buffer-pool-size=8M"]
    inventory = "SHOW DATABASES; SELECT user, host FROM mysql.user ORDER BY user, host"  # and roles

    def install(self):
        return [find_program("mariadb-install-db"), "--no-defaults", "--datadir=" + self.data,
                "--auth-root-authentication-method=normal", "--skip-test-db"] + self.small

    def serve(self):
        return [find_program("mariadbd"), "--no-defaults", "--datadir=" + self.data,
                "--bind-address=127.0.0.1", "--port=%d" % self.port,
                "--socket=socket",      # in the data folder: a full path may be too long for one
                "--innodb-flush-log-at-trx-commit=0", "--performance-schema=OFF"] + self.small

    def client(self, user="root", password=""):
        return [find_program("mariadb"), "--no-defaults", "--skip-ssl", "--protocol=tcp",
                "--host=127.0.0.1", "--port=%d" % self.port, "--user=" + user,
                "--password=" + password, "--batch", "--skip-column-names"]

    def open_client(self, *account):
        return SqlClient(self.client(*account) + ["--force", "--unbuffered"],
                         "SELECT '%s';" % SqlClient.END, r"ERROR (\d+) ")

    def session(self):
        return MariadbSession(self)


class Postgresql(DatabaseServer):
    name = "postgresql"
    programs = ("initdb", "postgres", "psql")
    apt = "apt-get install -y --no-install-recommends postgresql"
    death_signal = "QUIT"       # at once, yet its children and its shared memory go too
    inventory = ("SELECT datname FROM pg_database UNION ALL SELECT rolname FROM pg_roles"
                 " UNION ALL SELECT relname FROM pg_class ORDER BY 1")

    def install(self):
        return [find_program("initdb"), "--pgdata=" + self.data, "--username=postgres",
                "--auth=trust", "--encoding=UTF8", "--no-locale", "--no-sync"]

    def serve(self):
        return [find_program("postgres"), "-D", self.data, "-p", str(self.port), "-F",
                "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="]

    def client(self):
        return [find_program("psql"), "--host=127.0.0.1", "--port=%d" % self.port,
                "--username=postgres", "--dbname=postgres", "--no-psqlrc", "--quiet",
                "--tuples-only", "--no-align", "--field-separator=\t", "--pset=null=NULL",
                "--set=ON_ERROR_STOP=1"]

    def open_client(self):
        return SqlClient(self.client() + ["--set=ON_ERROR_STOP=0", "--set=VERBOSITY=verbose"],
                         "\\echo '%s'" % SqlClient.END, r"ERROR:  (\w{5}):")

    def session(self):
        return PostgresqlSession(self)


def need_database(engine):
    """Skip the test where the server is not installed; under CI, MariaDB's absence is a failure."""
    missing = [name for name in engine.programs + ("setpriv",) if not find_program(name)]
    if missing:
        reason = "no %s; on Debian and Ubuntu: %s" % (", ".join(missing), engine.apt)
        if engine is Mariadb and os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="module")
def database_servers():
    """Return a function that starts a server when it is first asked for; end them all at last."""
    with contextlib.ExitStack() as cleanup:
        @functools.lru_cache(maxsize=None)
        def start(engine):
            need_database(engine)
            running = engine(cleanup.enter_context(database_folder()))
            cleanup.callback(running.stop)
            return running
        yield start


needs_window_functions = pytest.mark.skipif(
    sqlite3.sqlite_version_info < (3, 25), reason="SQLite %s is too old" % sqlite3.sqlite_version)


@pytest.fixture(scope="module", params=[pytest.param(Sqlite, marks=needs_window_functions), Mariadb, Postgresql],
                ids=SQL_ENGINES)
def dbms(request, database_servers):
    """Every engine in turn."""
    return Sqlite() if request.param is Sqlite else database_servers(request.param)


@pytest.fixture(scope="module")
def notes():
    with open(NOTES, encoding="utf-8") as file:
        return file.read()


@pytest.fixture(scope="module")
def outcomes(dbms, notes):
    return play(dbms, parse_notes(notes))


# ---- Tests ----

def test_every_promise_of_the_notes_is_kept(dbms, notes, outcomes):
    assert broken(parse_notes(notes), dbms.name, outcomes) == []


def falsified(step, engine):
    """Yield step with its promise to engine changed, in each way that a slip of the pen might."""
    promise = promised(step, engine)
    wrong = []
    if isinstance(promise, str):
        wrong += ["0", "ok" if promise != "ok" else "1142"]
    elif promise is not None:
        wrong += [promise + [["one row more"]], "1064"]
        for i, row in enumerate(promise):
            wrong.append(promise[:i] + promise[i + 1:])
            for j in range(len(row)):
                wrong.append(promise[:i] + [row[:j] + ["other"] + row[j + 1:]] + promise[i + 1:])
    for other in wrong:
        yield step._replace(promises=dict(step.promises, **{engine: other}))
    if engine in step.promises and step.who == "file":      # the difference between engines left out
        yield step._replace(promises={name: rows for name, rows in step.promises.items()
                                      if name != engine})


def test_every_single_changed_promise_is_caught(dbms, notes, outcomes):
    changed = [wrong for step in parse_notes(notes) for wrong in falsified(step, dbms.name)]
    assert len(changed) > len(outcomes) > 0
    assert [wrong for wrong in changed if not broken([wrong], dbms.name, outcomes)] == []


FALSE_PROMISES = {
    "row": ("-- > WANG | NULL\n", "-- > WANG | lab.zip\n"),
    "missing-row": ("-- > LI | 940\n", "--\n"),
    "code": ("-- ! sqlite IntegrityError, mariadb 1062, postgresql 23505\n",
             "-- ! sqlite OperationalError, mariadb 1063, postgresql 23506\n"),
    "failure": ("-- ! sqlite IntegrityError, mariadb 1451, postgresql 23503\n",
                "-- ! sqlite ok, mariadb ok, postgresql ok\n"),
    "difference": ("-- > 3\n-- > mariadb: 3.5\n", "-- > 3.5\n-- > mariadb: 3\n"),
    "privilege": ("-- ! mariadb 1142, postgresql 42501\n", "-- ! mariadb ok, postgresql ok\n"),
}


@pytest.mark.parametrize("kind", sorted(FALSE_PROMISES))
def test_notes_with_a_false_promise_fail(dbms, notes, outcomes, kind):
    promise, changed = FALSE_PROMISES[kind]
    assert promise in notes
    faults = broken(parse_notes(notes.replace(promise, changed)), dbms.name, outcomes)
    assert bool(faults) == (kind != "privilege" or dbms.name != "sqlite"), faults   # no users there


def promised_output(notes, engine):
    """Return the rows that the file as a whole promises to print."""
    return [row for step in parse_notes(notes) if step.who == "file"
            for row in promised(step, engine)]


@pytest.mark.parametrize("engine, options", [
    (Mariadb, []),
    (Mariadb, ["--comments"]),      # the client cuts comments out, or hands them on
    (Postgresql, []),
], ids=["mariadb", "mariadb-comments", "psql"])
def test_file_runs_twice_in_a_client_and_leaves_nothing(database_servers, notes, engine, options):
    dbms = database_servers(engine)
    before = dbms.ask(dbms.inventory)
    for _ in range(2):
        printed = dbms.ask(notes, options)
        assert read_rows(printed.splitlines()) == promised_output(notes, dbms.name)
    assert dbms.ask(dbms.inventory) == before


@needs_window_functions
def test_file_runs_twice_in_python_and_leaves_nothing(notes):
    db = sqlite3.connect(":memory:")
    for _ in range(2):
        db.executescript(notes)
        assert db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone() == (0,)
    db.close()


@pytest.fixture
def sqlite3_shell():
    """Return the path of SQLite's shell, if one is installed that can refuse double-quoted strings."""
    shell = find_program("sqlite3")
    if not shell:
        pytest.skip("no sqlite3; on Debian and Ubuntu: apt-get install -y sqlite3")
    version = subprocess.check_output([shell, "-version"], encoding="ascii").split()[0]
    if [int(number) for number in version.split(".")] < [3, 29]:
        pytest.skip("sqlite3 %s is too old" % version)
    return shell


def test_file_runs_twice_in_the_sqlite3_shell_without_double_quoted_strings(sqlite3_shell, notes):
    printed = subprocess.check_output(
        [sqlite3_shell, "-batch", "-bail", "-init", os.devnull, "-nullvalue", "NULL",
         "-cmd", ".dbconfig dqs_dml off", "-cmd", ".dbconfig dqs_ddl off"],
        input=notes * 2, stderr=subprocess.DEVNULL, encoding="utf-8").splitlines()
    assert [line.split() for line in printed[:2]] == [["dqs_dml", "off"], ["dqs_ddl", "off"]]
    assert read_rows(printed[2:], "|") == promised_output(notes, "sqlite") * 2


@pytest.mark.skipif(not hasattr(sqlite3.Connection, "setconfig"), reason="new in Python 3.12")
def test_sqlite_takes_a_double_quoted_string_unless_told_not_to(notes):
    session = SqliteSession()
    session.db.execute("CREATE TABLE tb_table (id, name)")
    session.db.execute("INSERT INTO tb_table VALUES (1, 'YUAN')")
    example = 'SELECT * FROM tb_table WHERE NAME="YUAN"'
    assert example in notes
    session.db.setconfig(sqlite3.SQLITE_DBCONFIG_DQS_DML, True)
    assert session.run(example, "try") == [[1, "YUAN"]]
    session.db.setconfig(sqlite3.SQLITE_DBCONFIG_DQS_DML, False)
    assert session.run(example, "try") == "OperationalError"
    session.close()


@pytest.mark.parametrize("ci, outcome", [("", pytest.skip), ("true", pytest.fail)])
def test_missing_mariadb_is_a_skip_and_under_ci_a_failure(monkeypatch, ci, outcome):
    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr(shutil, "which", lambda *args, **options: None)
    with pytest.raises(outcome.Exception) as raised:
        need_database(Mariadb)
    assert Mariadb.apt in str(raised.value)


def processes_in(folder):
    """Return the ids of the processes that work in folder, as a server and its children do."""
    def works_there(pid):
        try:
            return os.readlink("/proc/%s/cwd" % pid).startswith(folder)
        except OSError:     # ended meanwhile, or another user's
            return False
    return [pid for pid in os.listdir("/proc") if pid.isdigit() and works_there(pid)]


@pytest.mark.parametrize("engine", [Mariadb, Postgresql])
@early
def test_no_server_outlives_a_killed_test_run(_, engine):
    need_database(engine)
    start = "import sys, {0} as tests; tests.{1}(sys.argv[1]); print('up', flush=True); input()"
    with database_folder() as folder, subprocess.Popen(
            [sys.executable, "-c", start.format(__name__, engine.__name__), folder],
            cwd=HERE,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8") as run:
        try:
            assert run.stdout.readline() == "up\n"
            assert processes_in(folder)
        finally:
            run.kill()
        deadline = time.monotonic() + DATABASE_TIMEOUT
        while processes_in(folder) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert processes_in(folder) == []


# ==== README: every command in it works =============================================================================

README = os.path.join(HERE, "README.md")
FILES = ["ftp_server.py", "ftp_client.py", "db_notes.sql", "test_ftp.py", "README.md"]
BLOCK = re.compile(r"^(?:<!-- exit (\d+) -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROMPT = re.compile(r"python3 ftp_client\.py( \S+ \d+)?$")


def readme():
    return read_text(README)


def sections(text, mark="## "):
    """Split a text at its headings: {heading: what stands beneath}."""
    pieces = re.split("^" + re.escape(mark), text, flags=re.MULTILINE)
    return {piece.split("\n", 1)[0]: piece for piece in pieces[1:]}


RUNNABLE = [title for title, text in sections(readme()).items() if BLOCK.search(text)] if os.path.exists(README) else []


class Typist:
    """Types what a page says in a fresh folder with copies of the five files; only the port is another."""

    def __init__(self, folder):
        self.folder, self.shown, self.process = str(folder), [], None
        with listen() as sock:
            self.port = str(sock.getsockname()[1])
        for name in FILES:
            data = read_bytes(os.path.join(HERE, name))
            with open(os.path.join(self.folder, name), "wb") as file:
                file.write(data.replace(b"\nPORT = 8885 ", b"\nPORT = %s " % self.port.encode("ascii")))
        bin_folder = os.path.join(self.folder, "bin")
        os.mkdir(bin_folder)
        for name in ("python", "python3"):
            path = os.path.join(bin_folder, name)
            with open(path, "w") as file:
                file.write('#!/bin/sh\ncase "$1" in ftp_*) set -- -W error "$@";; esac\nexec "%s" "$@"\n' % sys.executable)
            os.chmod(path, 0o755)
        self.environment = dict(ENVIRONMENT, PATH=bin_folder + os.pathsep + os.environ["PATH"])
        self.environment.pop("PYTHONSTARTUP", None)

    def play(self, text):
        """Do what the blocks of one exercise say, and look for what they promise."""
        blocks = [(int(code or 0), kind, body.replace("8885", self.port)) for code, kind, body in BLOCK.findall(text)]
        promised = collections.Counter()
        self.shown = []
        try:
            for number, (code, kind, body) in enumerate(blocks):
                if kind == "sh":
                    following = blocks[number + 1][2] if number + 1 < len(blocks) else ""
                    for line in body.splitlines():
                        self.type(line, code, following)
                elif kind == "python":
                    done = self.run([sys.executable, "-i", "-q"], body)
                    assert done.returncode == 0
                elif kind == "text":
                    for line in body.splitlines():
                        if line.strip() and not line.startswith(">>>"):
                            promised[line] += 1
                            self.look_for(line, promised[line])
        finally:
            self.stop()

    def type(self, line, code, following):
        if line.startswith("python3 ftp_server.py"):
            self.stop(signal.SIGKILL)
            self.start_server(line)
        elif " -m venv " in line:
            self.collect_tests(line)
        elif PROMPT.match(line):
            typed = [text[3:] for text in following.splitlines() if text.startswith(">>>")]
            assert self.run(["sh", "-c", line], "\n".join(typed) + "\n").returncode == code
        else:
            assert self.run(["sh", "-c", line]).returncode == code, line + "\n" + "\n".join(self.shown)

    def run(self, command, given=""):
        done = subprocess.run(command, cwd=self.folder, input=given.encode("utf-8"), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              timeout=12 * PATIENCE, env=self.environment)
        for stream in (done.stdout, done.stderr):
            text = stream.decode("utf-8")
            assert "Traceback" not in text and "SyntaxError" not in text, text
            self.shown.append(text)
        return done

    def start_server(self, line):
        self.log_path = os.path.join(self.folder, "window%d" % next(counter))
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(PYTHON + line.split()[1:], cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log,
                                            stderr=subprocess.STDOUT, env=self.environment)
        wait_for(lambda: self.process.poll() is not None or b"listening on " in read_bytes(self.log_path))
        assert self.process.poll() is None, read_bytes(self.log_path)

    def stop(self, how=signal.SIGINT):
        process, self.process = self.process, None
        if process:
            process.send_signal(how)
            assert process.wait(PATIENCE) == (0 if how == signal.SIGINT else -how)
            self.shown.append(read_text(self.log_path))
            assert not TRACES.search(self.shown[-1]), self.shown[-1]

    def collect_tests(self, line):
        """The command for the tests, but for the download: its last part finds and loads them."""
        venv, pip, tests = line.split(" && ")
        assert (venv, pip) == ("python3 -m venv .venv", ".venv/bin/pip install -q pytest")
        done = self.run([sys.executable] + tests.split()[1:] + ["--collect-only", "-p", "no:cacheprovider"])
        assert tests.split()[0] == ".venv/bin/python" and done.returncode == 0

    def look_for(self, line, times):
        """Wait until a line is shown so many times; in the page's text … stands for anything."""
        words = " ".join(line.split())
        pattern = re.compile(".*".join(map(re.escape, words.split("…"))) + "$")

        def seen():
            log = [read_text(self.log_path)] if self.process else []
            return times <= sum(bool(pattern.match(" ".join(re.sub(r"^(>>>)+", "", shown).split())))
                                for text in self.shown + log for shown in text.splitlines())

        try:
            wait_for(seen)
        except AssertionError:
            pytest.fail("nowhere to be seen: %s\n%s" % (line, "\n".join(self.shown)))


@linux
@at_once_for({title: title for title in RUNNABLE})
def test_what_the_readme_says_works_in_a_fresh_folder(title, folder):
    text = sections(readme())[title]
    typist = Typist(folder)
    exercises = sections(text, "### ")
    for exercise in [text] if not exercises else exercises.values():
        typist.play(exercise)
        if "kill" in exercise.split("\n")[0].lower():
            assert any(re.search(r'-> .*"cmd": "put".*"offset": [1-9]', shown) for shown in typist.shown)


def test_readme_has_a_lab_sheet_of_about_ten_exercises():
    exercises = sections(sections(readme())["Lab sheet"], "### ")
    assert 9 <= len(exercises) <= 13
    for title, text in exercises.items():
        kinds = [kind for _, kind, _ in BLOCK.findall(text)]
        assert "text" in kinds and {"sh", "python"} & set(kinds) and "*Question:*" in text, title


@pytest.mark.parametrize("script, title", [(SERVER, "The server"), (CLIENT, "The client")], ids=["server", "client"])
def test_readme_lists_every_option(script, title, tmp_path):
    shown = run(PYTHON + [script, "--help"], tmp_path).out
    options = {name for pair in re.findall(r"^  (-\w|--[\w-]+)(?:, (--[\w-]+))?", shown, re.MULTILINE) for name in pair if name}
    rows = [row.split("|")[1] for row in sections(readme())[title].splitlines() if re.match(r"\| `-", row)]
    assert {name for row in rows for name in re.findall(r"(?<![\w-])-[\w-]+", row)} == options


def test_readme_lists_every_command_and_every_error_code():
    rows = re.findall(r"^\| (`.*?) \| ", sections(readme())["The client"], re.MULTILINE)
    commands = {command for row in rows for command in re.findall(r"`(\w+(?:\(\))?|\?)", row)}
    assert set(ftp_client.COMMANDS) - {"?", "!"} <= commands
    protocol = sections(readme())["The protocol"]
    assert set(ftp_server.COMMANDS) == set(re.findall(r'^\| `\{"cmd":"(\w+)"', protocol, re.MULTILINE))
    assert set(CODES) <= set(re.findall(r"`([a-z-]+)`", protocol))


def resolve(name):
    """The class or function of one of the scripts that a dotted name means, or None."""
    for module in (ftp_server, ftp_client):
        thing = module
        for part in name.split("."):
            thing = getattr(thing, part, None)
        if thing is not None:
            return thing


def test_table_of_classic_bugs_names_real_code_and_real_tests():
    rows = [row.strip("|").split("|") for row in sections(readme())["Classic bugs"].splitlines() if row.startswith("| ")][1:]
    assert len(rows) >= 15
    for bug, wrong, code, tests in rows:
        names = re.findall(r"`([^`]+)`", code)
        assert names and all(callable(resolve(name)) for name in names), "no such thing: " + code
        tests = re.findall(r"`([^`]+)`", tests)
        assert tests and all(callable(globals().get(name)) and name.startswith("test_") for name in tests), "no such test: %s" % tests


# ==== Benchmark: python test_ftp.py, without pytest =================================================================
#
# Both modes on loopback beside "raw", the least that Python does to move the same bytes. Rates say something about
# the machine; the ratio to raw, measured in the same round, says something about the scripts.

SMALL_SIZE, CROWD_SIZE = 4 * KIB, 4 * MIB
ROUNDS, ROW_TIME = 5, 7  # no further round after so many seconds, so that all takes less than two minutes
LONGEST = 120  # seconds that one process may take before it is killed
GETS = 31  # 1 MiB gets whose median is what one more client waits

Side = collections.namedtuple("Side", "name process port")
Run = collections.namedtuple("Run", "seconds server client")  # time; CPU seconds of either side, None where unknown
Work = collections.namedtuple("Work", "what unit amount size run first")  # run(side) is one run; first() prepares
SIDES = ["raw", "selectors", "socketserver"]
BARE_PYTHON = [sys.executable, "-I", "-S"]  # what this machine adds to the start of each Python is not measured
TABLE_LINE = "%-39s %-7s %8s %9s  %10s %5s %9s  %12s %5s %9s"


class Failure(Exception):
    """Something could not be measured; str() says why."""


# The functions as far as BARE run in processes of their own, without anything else of this file.


def bare_server():
    """Serve served/ and store into stored/: no checks, no digest, no log, a thread for each connection."""
    threading.stack_size(1 << 18)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(1024)
    print("listening on 127.0.0.1:%d (raw)" % listener.getsockname()[1], flush=True)
    while True:
        threading.Thread(target=raw_session, args=listener.accept()[:1], daemon=True).start()


def raw_session(sock):
    """Answer lines `get NAME` and `put NAME SIZE`; small answers are held back until an empty line asks for them."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    owed = bytearray()
    with sock, sock.makefile("rb", 1 << 18) as stream:
        for line in stream:
            words = line.decode().split()
            if not words:
                sock.sendall(owed)
                owed.clear()
            elif words[0] == "get":
                raw_send(sock, owed, "served/" + words[1], "%d\n")
            else:
                raw_store(stream, "stored/" + words[1], int(words[2]))
                owed += b"ok\n"


def raw_send(sock, owed, path, header):
    """Send a header line with the file's size in it, and the file; what is small is joined in owed."""
    fd = os.open(path, os.O_RDONLY)
    size, sent = os.fstat(fd).st_size, 0
    owed += (header % size).encode()
    small = size <= 1 << 16
    if small:
        owed += os.read(fd, size)
    if not small or len(owed) > 1 << 18:
        sock.sendall(owed)
        owed.clear()
    while not small and sent < size:
        sent += os.sendfile(sock.fileno(), fd, sent, size - sent)
    os.close(fd)


def raw_store(stream, path, size):
    """Receive size bytes into a partial file, then give it its name."""
    fd = os.open(path + ".part", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    if size <= 1 << 16:
        os.write(fd, stream.read(size))
    else:
        view = memoryview(bytearray(1 << 20))
        while size:
            count = stream.readinto1(view[:size])  # the rest of the stream's small buffer, then straight recv_into()
            if not count:
                raise EOFError("the other side closed")
            size -= os.write(fd, view[:count])
    os.close(fd)
    os.replace(path + ".part", path)


def raw_get(port, pattern, count):
    """Fetch names, numbers for the pattern's star, over one connection; at most 512 are asked for ahead."""
    names = [pattern.replace("*", str(number)) for number in range(int(count))]
    sock = socket.create_connection(("127.0.0.1", int(port)))
    with sock, sock.makefile("rb", 1 << 18) as stream:
        for number in range(-256, len(names)):
            if number % 256 == 0:
                asked = names[number + 256:number + 512]
                sock.sendall(("".join("get %s\n" % name for name in asked) + "\n").encode())
            if number >= 0:
                raw_store(stream, names[number], int(stream.readline()))


def raw_put(port, pattern, count):
    """Send files over one connection; then see that each was stored."""
    names = [pattern.replace("*", str(number)) for number in range(int(count))]
    sock = socket.create_connection(("127.0.0.1", int(port)))
    owed = bytearray()
    with sock, sock.makefile("rb") as stream:
        for name in names:
            raw_send(sock, owed, name, "put " + name + " %d\n")
        sock.sendall(owed + b"\n")
        for _ in names:
            if stream.readline() != b"ok\n":
                raise EOFError("the other side closed")


def crowd(port, clients, size, request, last):
    """Be many clients at once that throw away what they get; print the seconds until all have got all of it.

    An answer is a line, size bytes and whatever ends in last."""
    selector, buffer, start = selectors.DefaultSelector(), bytearray(1 << 18), time.perf_counter()
    for _ in range(int(clients)):
        sock = socket.socket()
        sock.setblocking(False)
        sock.connect_ex(("127.0.0.1", int(port)))
        selector.register(sock, selectors.EVENT_WRITE, [])
    while selector.get_map():
        for (sock, _, _, left), event in selector.select():
            if event & selectors.EVENT_WRITE:  # connected, or the send raises
                sock.send(request.encode())
                selector.modify(sock, selectors.EVENT_READ, left)
                continue
            count = sock.recv_into(buffer)
            if not count:
                raise EOFError("the server closed")
            if not left:
                left.append(buffer.index(b"\n", 0, count) + 1 + int(size) + len(last))
            left[0] -= count
            if left[0] <= 0 and buffer.endswith(last.encode(), 0, count):
                selector.unregister(sock)
                sock.close()
    print(time.perf_counter() - start)


def idlers(port, clients):
    """Connect and say hello that many times, tell that it is done, and wait until stdin ends."""
    kept = []
    for _ in range(int(clients)):
        kept.append(socket.create_connection(("127.0.0.1", int(port)), 10))
        kept[-1].sendall(b'{"cmd":"hello"}\n')
        if b'"ok": true' not in kept[-1].recv(4096):
            sys.exit("a client was refused")
    print("ready", flush=True)
    sys.stdin.read()


BARE = [bare_server, raw_session, raw_send, raw_store, raw_get, raw_put, crowd, idlers]


def bare(function, *args):
    """Return the command that calls one of the functions in BARE in a process of its own."""
    code = ["import os, selectors, socket, sys, threading, time\n"] + [inspect.getsource(part) for part in BARE]
    call = "%s(*sys.argv[1:])" % function.__name__
    return BARE_PYTHON + ["-c", "".join(code) + call] + [str(arg) for arg in args]


@contextlib.contextmanager
def bounded(process):
    """Kill the process if the block takes too long or fails."""
    timer = threading.Timer(LONGEST, process.kill)
    timer.start()
    try:
        yield process
    except BaseException:
        process.kill()
        raise
    finally:
        timer.cancel()


@contextlib.contextmanager
def start_side(name, folder):
    """Run a server, raw or ours in one mode, while the block runs."""
    ours = BARE_PYTHON + [SERVER, "127.0.0.1", "0", "--mode", name, "--upload", "stored", "--download", "served",
            "--no-discovery", "--timeout", str(10 * LONGEST)]
    process = subprocess.Popen(bare(bare_server) if name == "raw" else ours, cwd=folder, stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        with bounded(process):
            line = process.stdout.readline().decode()
        if not line:
            sys.exit("the server does not start: %s" % name)
        yield Side(name, process, int(line.split(":")[1].split()[0]))
    finally:
        process.terminate()
        with bounded(process):
            process.communicate()


def server_cpu(process):
    """Return the CPU seconds that a running process has used; None where there is no /proc."""
    with contextlib.suppress(OSError):
        fields = read_bytes("/proc/%d/stat" % process.pid).rpartition(b")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return None


def memory(process):
    """Return the KiB that a process holds, its share of what is shared; None where the system does not tell."""
    with contextlib.suppress(OSError):
        return int(re.search(rb"\nPss: *(\d+)", read_bytes("/proc/%d/smaps_rollup" % process.pid)).group(1))
    return None


def median(values):
    return statistics.median(values) if values else None


def shown(value, form):
    return "-" if value is None else form % value


def difference(after, before, unit=1):
    return None if after is None or before is None else (after - before) / unit


def clock(side, command, cwd):
    """Run a client to its end. Return its Run, the process's start and end included, and what it printed."""
    before, used, start = server_cpu(side.process), os.times(), time.perf_counter()
    with subprocess.Popen(command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT) as process, bounded(process):
        out = process.communicate()[0].decode("utf-8", "replace").strip()
    seconds, now = time.perf_counter() - start, os.times()  # the only child that ended meanwhile
    if process.returncode:
        raise Failure("%s: %s" % (side.name, out.split("\n")[-1] or "exit %d" % process.returncode))
    client_cpu = None if os.name == "nt" else now[2] + now[3] - used[2] - used[3]
    return Run(seconds, difference(server_cpu(side.process), before), client_cpu), out


def one_get(side):
    """Return the seconds that a new client waits for 1 MiB."""
    start = time.perf_counter()
    with socket.create_connection(("127.0.0.1", side.port), PATIENCE) as sock, sock.makefile("rb") as stream:
        sock.sendall(wire({"cmd": "get", "name": "one", "verify": False}))
        if not json.loads(stream.readline().decode())["ok"] or len(stream.read(MIB)) < MIB:
            raise Failure("%s: a get of 1 MiB failed" % side.name)
        stream.readline()
    return time.perf_counter() - start


def sizes(path):
    """Return the size of a file, or {name: size} of a folder."""
    if not os.path.isdir(path):
        return os.path.getsize(path)
    return {name: os.path.getsize(os.path.join(path, name)) for name in os.listdir(path)}


class Benchmark:
    """The folders, the servers, the work that they are given, and the table of how they did."""

    def __init__(self, options, folder):
        self.options, self.folder, self.sides = options, folder, []

    def path(self, *parts):
        return os.path.join(self.folder, *parts)

    def fill(self):
        """Make the folders and what is served."""
        for name in ("served", "stored", "local", "served/small"):
            os.mkdir(self.path(name))
        for name, size in (("big", self.options.size * MIB), ("crowd", CROWD_SIZE), ("one", MIB)):
            with open(self.path("served", name), "wb") as file:
                for _ in range(size // MIB):
                    file.write(os.urandom(MIB))
        for number in range(self.options.files):
            with open(self.path("served", "small", str(number)), "wb") as file:
                file.write(os.urandom(SMALL_SIZE))

    def works(self):
        """Return the rows of the table, but for those about idle clients."""
        size, files = self.options.size * MIB, self.options.files

        def stream(what, verb, *flags, touch=True, first=None):
            run = functools.partial(self.transfer, "big", "big", 1, [verb, "big"] + list(flags), touch)
            return Work("one stream " + what, "MB/s", size / 1e6, size, run, first)

        def small(what, verb):
            run = functools.partial(self.transfer, "small", "small/*", files, [verb, "-r", "small"], True)
            return Work("%d files of 4 KiB %s" % (files, what), "files/s", files, 0, run, None)

        def many(clients):
            total, run = clients * CROWD_SIZE, functools.partial(self.crowd, clients)
            return Work("%d clients at once, 4 MiB each" % clients, "MB/s", total / 1e6, total, run, None)

        return [stream("down, verified", "get"),
                stream("down, verified, sent before", "get", touch=False, first=self.settle),
                stream("down, --no-verify", "get", "--no-verify"),
                stream("up, verified", "put"), stream("up, --no-verify", "put", "--no-verify"),
                small("down", "get"), small("up", "put")] + [many(clients) for clients in self.options.clients]

    def settle(self):
        """Let every server send a file that was left alone for long enough for its digest to be kept."""
        time.sleep(ftp_server.SETTLED + 0.1)
        for side in self.sides:
            self.transfer("big", "big", 1, ["get", "big"], False, side)

    def transfer(self, what, pattern, count, command, touch, side):
        """Let one client get or put what is in served, to where nothing is yet; touched means hashed afresh."""
        get = command[0] == "get"
        source, target = self.path("served", what), self.path("local" if get else "stored", what)
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(target) if os.path.isdir(target) else os.unlink(target)
        if os.path.isdir(source):
            os.mkdir(target)
        for number in range(count if touch else 0):
            os.utime(self.path("served", pattern.replace("*", str(number))))
        self.touch_memory(os.path.getsize(source) if count == 1 else 0)
        if side.name == "raw":
            command = bare(raw_get if get else raw_put, side.port, pattern, count)
        else:
            command = BARE_PYTHON + [CLIENT, "127.0.0.1", str(side.port)] + command + ["--quiet"]
        run, _ = clock(side, command, self.path("local" if get else "served"))
        if sizes(target) != sizes(source):
            raise Failure("%s: what arrived is not what was sent" % side.name)
        return run

    def touch_memory(self, size):
        """Write and remove more than will be stored: a virtual machine's first use of memory costs more than all else."""
        with open(self.path("touched"), "wb") as file:
            for _ in range(2 * size // MIB):
                file.write(bytes(MIB))
        os.unlink(file.name)

    def crowd(self, clients, side):
        """Let many clients get a file at once; all of it arrives at each, or it is a failure."""
        ask = wire({"cmd": "get", "name": "crowd", "verify": False}).decode()
        words = ["get crowd\n", ""] if side.name == "raw" else [ask, "\n"]
        run, out = clock(side, bare(crowd, side.port, clients, CROWD_SIZE, *words), self.folder)
        return run._replace(seconds=float(out), client=None)

    def measure(self, work):
        """Run the sides in turn, round after round, and print the row."""
        runs = {name: [] for name in SIDES}
        if work.first:
            work.first()
        start = time.monotonic()
        for number in range(self.options.rounds or ROUNDS):
            if number and not self.options.rounds and time.monotonic() - start > ROW_TIME:
                break
            for side in self.sides:
                runs[side.name].append(work.run(side))
        self.line(work.what, work.unit, *(self.cells(work, runs["raw"], runs[name]) for name in SIDES))

    @staticmethod
    def cells(work, raw, runs):
        """Return a side's rate, its ratio to raw and its CPU seconds per GiB, server + client."""
        rate = median([work.amount / run.seconds for run in runs])
        ratio = median([bare_run.seconds / run.seconds for bare_run, run in zip(raw, runs)])
        columns = ([run.server for run in runs], [run.client for run in runs]) if work.size else ()
        spent = ["%.2f" % (sum(used) / len(used) / work.size * GIB)  # not the median: this clock has steps of 10 ms
                 for used in columns if used and None not in used]
        return shown(rate, "%.0f"), shown(ratio, "%.2f"), "+".join(spent) or "-"

    @staticmethod
    def line(what, unit, raw, *others):
        """Print a row; raw needs no ratio to itself."""
        print(TABLE_LINE % (what, unit, raw[0], raw[2], *sum(others, ())), flush=True)

    def idle(self):
        """Print what thousands of clients cost that only wait: memory, and time of one more that wants something."""
        columns = [(None,) * 3]
        for name in SIDES[1:]:
            with start_side(name, self.folder) as side:
                alone, before = median([one_get(side) for _ in range(GETS)]), memory(side.process)
                command = bare(idlers, side.port, self.options.idle)
                pipes = dict.fromkeys(["stdin", "stdout", "stderr"], subprocess.PIPE)
                with subprocess.Popen(command, **pipes) as process, bounded(process):
                    if process.stdout.readline() != b"ready\n":
                        reason = process.communicate()[1].decode("utf-8", "replace").strip().split("\n")[-1]
                        raise Failure("%s: %s" % (name, reason))
                    each = difference(memory(side.process), before, self.options.idle)
                    beside = median([one_get(side) for _ in range(GETS)])
                    process.communicate()
            columns.append((each, 1e3 * alone, 1e3 * beside))
        what = "%d idle clients: " % self.options.idle
        rows = ["%smemory of each" % what, "1 MiB get, no other client", "1 MiB get beside %d idle" % self.options.idle]
        for row, unit, values in zip(rows, ["KiB", "ms", "ms"], zip(*columns)):
            self.line(row, unit, *((shown(value, "%.1f"), "-", "-") for value in values))

    def run(self):
        """Print the table; return whether all could be measured."""
        print(TABLE_LINE % ("", "", "raw", "CPU", "selectors", "x raw", "CPU", "socketserver", "x raw", "CPU"), flush=True)
        rows = [(work.what, functools.partial(self.measure, work)) for work in self.works()]
        if self.options.idle:
            rows.append(("%d idle clients, 1 MiB get" % self.options.idle, self.idle))
        well = True
        for what, measure in rows:
            if self.options.only and not any(word in what for word in self.options.only):
                continue
            try:
                measure()
            except (Failure, OSError) as error:
                print("%-39s %s" % (what, error), flush=True)
                well = False
        return well


def storage(options):
    """Return the folder to hold all files: in memory where the system has a file system there, with room enough."""
    room = 5 * options.size * MIB + 3 * options.files * SMALL_SIZE + GIB // 4
    in_memory = os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").free > room
    return options.dir or ("/dev/shm" if in_memory else tempfile.gettempdir())


def benchmark(argv=None):
    """Measure as the command line says; return the exit code."""
    parser = argparse.ArgumentParser(description="Measure both modes on loopback beside bare Python sockets.")
    add = parser.add_argument
    add("--size", type=int, default=512, metavar="MIB", help="of the file for one stream (default: %(default)s)")
    add("--rounds", type=int, metavar="N", help="default: %d, fewer where they take long" % ROUNDS)
    add("--files", type=int, default=2000, metavar="N", help="small ones in a session (default: %(default)s)")
    add("--clients", type=int, nargs="+", default=[100, 500], metavar="N", help="at once (default: 100 500)")
    add("--idle", type=int, default=5000, metavar="N", help="clients that only wait; 0: none (default: %(default)s)")
    add("--only", nargs="+", metavar="WORDS", help="only rows that hold one of these, as up, small or idle")
    add("--dir", help="where to make files (default: in memory, else the temporary folder)")
    options = parser.parse_args(argv)
    ftp_server.raise_descriptor_limit()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))  # so that what was started is ended
    place = storage(options)
    print("Python %s, %s, %d cores; files in %s; one stream: %d MiB" % (
        sys.version.split()[0], sys.platform, os.cpu_count(), place, options.size))
    print("x raw: median of ours / raw of the same round.  CPU: seconds per GiB, server + client.\n")
    with tempfile.TemporaryDirectory(dir=place) as folder, contextlib.ExitStack() as stack:
        bench = Benchmark(options, folder)
        bench.fill()
        bench.sides = [stack.enter_context(start_side(name, folder)) for name in SIDES
                       if name != "raw" or hasattr(os, "sendfile")]
        return 0 if bench.run() else 1


if __name__ == "__main__":
    sys.exit(benchmark())
