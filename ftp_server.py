#!/usr/bin/env python3
"""A file server in one file: `put` stores into upload/, `get` serves from download/.

    python ftp_server.py                       for this machine only, port 8885, one event loop
    python ftp_server.py 0.0.0.0               for everybody on the network
    python ftp_server.py --mode socketserver   a thread for each client instead of the event loop

The protocol, over TCP. The first byte of a request tells the dialect: "{" is framed, all else classic.

    framed   a JSON object on a line, then as many raw bytes as it tells; the server answers likewise
        hello                                       -> mode, version, limits
        ls      path recursive                      -> size left_out, then a JSON object a line
        get     name offset sha256                  -> size offset mtime, then the bytes, then sha256
        resume  name size id                        -> offset sha256: what is here of a broken put
        put     name size offset id mtime           -> name size sha256 duplicate
                then the bytes, then {"sha256": …}
        mkdir   name                                -> name: an empty folder, that no file would bring along
        whatever fails                              -> {"ok": false, "code": …, "error": …}
    classic  put|name|size  -> OK, then the bytes   (no answer)
             get|name|0     -> YES|size or NO|0;  second_active -> the bytes

Reading order: files (no sockets), messages (no I/O), the two kinds of wait and what is built on them,
the session (one client, written once, top to bottom), and the two ways to run many of them: a thread
each (socketserver) or all in one loop (selectors). "A thread is an event loop with one connection."
"""
import argparse
import codecs
import collections
import contextlib
import errno
import hashlib
import heapq
import io
import itertools
import json
import logging
import math
import os
import queue
import re
import select
import selectors
import shutil
import signal
import socket
import socketserver
import stat
import sys
import threading
import time
import types

try:
    import fcntl
    import resource
    import termios
except ImportError:  # Windows
    fcntl = resource = termios = None
    import msvcrt

VERSION = "1.0"
PORT = 8885                # the original's
BACKLOG = 1024             # connections the kernel keeps for us: a class that starts at once loses nobody
LOOPBACK_BUFFER = 1 << 19  # bytes of a socket's buffers on loopback: what is on its way stays in the processor's cache
CHUNK = 1 << 18            # bytes read from a file or a socket before they are hashed and passed on
RECEIVE = 1 << 19          # bytes of an upload that are collected before they are written
PIPE = 1 << 20             # bytes that the pipe of an unhashed upload holds: the most that any user may ask for, see pipe(7)
SLICE = 160 << 10          # bytes sent to one client before the others have their turn, at least
TURN = 1 << 27             # bytes sent to all clients together in such a round, about: the fewer they are, the larger the slices
SMALL = 1 << 16            # bytes up to which reading and hashing takes less time than waiting for a turn to compute
JOIN = 1 << 18             # bytes of small answers that are joined into one send
LISTED = 20                # files listed, and folders opened, between two chances for others to go first
BIG_FOLDER = 1 << 14       # bytes of a folder itself, not its files: from there on its names may take as long as LISTED files
LONG_HEADER = 1 << 8       # bytes of a header up to which parsing it takes less than a tenth of a millisecond
SKIP_LIMIT = 1 << 20       # bytes of a refused upload that are read past to keep the connection
HEADER_TIME = 10           # seconds from a header's first byte to its last
WRITE_TIME = 0.05          # seconds without a further byte after which what came is written to the partial file
QUIET_TIME = 0.02          # seconds without a further byte that end a classic request
LINGER_TIME = 5            # seconds that a peer has to read the last answer before the socket goes
TAKEOVER_TIME = 5          # seconds that an older session has to let go of an upload
TELL_TIME = 0.5            # seconds of those in which it may still tell its client why, before it is cut
STOP_TIME = 1              # seconds that sessions have to end when the server stops
TICK = 0.05                # seconds between two looks at whether to stop
LOOK_UP_TIME = 0.5         # seconds that the banner waits for a name server to tell our addresses
DISCOVERY_SIZE = 512       # bytes of a discovery request, at least
DISCOVERY_RATE = 50        # answers to such in a second, at most
QUICK = 0.0005             # seconds that one session's work with its files takes, at most, if the disk is quick
SLOW_TIME = 0.25           # seconds for which the disk is taken to be slow after it was slow once
ACCEPTS = 32               # connections that are accepted before the clients already here have their turn
RUN_TIME = 0.005           # seconds for which one client's requests, if they are here already, are answered without a pause
ROUND = 0.1                # seconds, about, until a client has its next turn, if hundreds have sent requests
PARTIAL = ".partial"       # folder of the unfinished uploads, inside the upload folder
PARTIAL_LIFE = 24 * 3600   # seconds that an unfinished upload is kept
SWEEP_EVERY = 3600         # seconds between two looks for such
DIGESTS = 4096             # files whose SHA-256 is remembered
SETTLED = 2                # seconds a file must have been left alone for that: clocks of file systems are coarse
FRESH = 0.05               # seconds after a write in which the next one may get the same stamps, where they are not that coarse
NAME_LIMIT = 255           # bytes of one part of a name
PATH_LIMIT = 4096          # bytes of a whole name
READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
HAS_POLL = hasattr(select, "poll")      # Windows has select() only: 512 sockets, and a shutdown() of ours ends no wait
SELECTED = math.inf if HAS_POLL else 500    # clients that can be waited for
SPARE = 32                 # descriptors, and a quarter of all if that is more, that clients leave for files
WAKE = math.inf if HAS_POLL else 0.5    # seconds until a session that waits looks whether it was cut
QUEUE = getattr(queue, "SimpleQueue", queue.Queue)     # Python 3.6 has the slow one only

# The kinds of work that a session announces before it begins, see announce(). Of each kind at most so many sessions are
# at work at a time, and the others wait in line, see Turns: where hundreds of threads want the interpreter at once, each
# gets it too late, and new clients latest of all.
BLOCKS = "blocks"          # may stand still for a while, as for a disk
COMPUTES = "computes"      # keeps a processor busy, as for a hash
LISTS = "lists"            # the rest of a long listing, which need not wait for hashes
PARSES = "parses"          # decodes a long header
SENDS = "sends"            # sendfile(2) in a thread of its own; the loop takes it for one that BLOCKS
RUNS = "runs"              # all else that a thread of its own does when its socket is ready
FEW = max(2, os.cpu_count() or 1)
MOST = 64                  # where disks may hang
AT_ONCE = {BLOCKS: MOST, COMPUTES: FEW, LISTS: FEW, PARSES: FEW, SENDS: FEW, RUNS: min(FEW, 8)}
STUCK = 0.5                # seconds after which a session still at work isn't counted: its disk may hang. But see make_turns()

LOG = logging.getLogger("ftp_server")


# ==== Errors: what a client is told ====================================================================

class Refusal(Exception):
    """A request that can't be granted: str() is for people, code for programs, and no path of ours in either.

    closes: the connection can't go on after this answer."""

    def __init__(self, code, text, closes=False):
        super().__init__(text)
        self.code, self.closes = code, closes


class BadMessage(Refusal):
    """What arrived is not a message, or a field of it is not what it must be."""

    def __init__(self, text):
        super().__init__("bad-request", text)


class TimedOut(Refusal):
    """Nothing moved for too long."""

    def __init__(self, text):
        super().__init__("timeout", text, closes=True)


class Gone(Exception):
    """The peer closed the connection, or it broke."""


CODES = {getattr(errno, name): code for code, names in {
    "not-found": "ENOENT", "not-a-file": "EISDIR ELOOP ENXIO", "bad-name": "ENAMETOOLONG EILSEQ",
    "denied": "EACCES EPERM EROFS ENOTDIR", "disk-full": "ENOSPC EDQUOT EFBIG", "busy": "EMFILE ENFILE ENOMEM ENOBUFS EAGAIN WSAEMFILE",
}.items() for name in names.split() if hasattr(errno, name)}


def refusal_of(error):
    """The Refusal that an OSError of the file system amounts to."""
    text = os.strerror(error.errno) if error.errno else "the file system failed"
    if error.errno == errno.ELOOP:
        text = "a symbolic link"        # which is never followed
    return Refusal(CODES.get(error.errno, "server-error"), text)


# ==== Files: names, folders, downloads, uploads (no sockets) ==============================================

UNSAFE = re.compile("[\0-\x1f\x7f-\x9f\ud800-\udfff\\\\]")       # C0, DEL, C1, lone surrogates, backslash
WINDOWS_UNSAFE = re.compile(r'[<>:"|?*]|[. ]$')
WINDOWS_DEVICE = re.compile(r"^(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³]|conin\$|conout\$)(?= *(?:$|\.))", re.IGNORECASE)
# O_NONBLOCK: opening a FIFO must not wait for its other end. O_BINARY is Windows'.
OPEN_FLAGS = sum(getattr(os, flag, 0) for flag in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY", "O_NOINHERIT"))
HAS_DIR_FD = os.open in os.supports_dir_fd
# What the system says of a call that the disk or the system lacks; the two in the middle differ on macOS.
UNSUPPORTED = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}


def split_name(name):
    """Check a name that came over the wire and return its parts. Raises Refusal."""
    if UNSAFE.search(name):
        raise Refusal("bad-name", "a name may not hold a backslash, a control character or a lone surrogate")
    if len(name.encode("utf-8")) > PATH_LIMIT:
        raise Refusal("bad-name", "the name is longer than %d bytes" % PATH_LIMIT)
    parts = name.split("/")
    for part in parts:
        if part in ("", ".", "..") or part.casefold() == PARTIAL:
            raise Refusal("bad-name", "a name may not be absolute and may not hold an empty part, '.', '..' or %r"
                          % PARTIAL)
        if len(part.encode("utf-8")) > NAME_LIMIT:
            raise Refusal("bad-name", "a part of the name is longer than %d bytes" % NAME_LIMIT)
    return [storable(part) for part in parts]


def storable(part, windows=os.name == "nt"):
    """The part as this system can hold it: what Windows forbids becomes "_"."""
    return WINDOWS_DEVICE.sub(r"\1_", WINDOWS_UNSAFE.sub("_", part)) if windows else part


UNICODE_DISK = os.name == "nt" or sys.getfilesystemencoding().lower() == "utf-8"


def to_disk(part):
    """The part as os functions take it: UTF-8 on the disk, whatever the locale's encoding is."""
    return part if UNICODE_DISK else os.fsdecode(part.encode("utf-8"))


def from_disk(name):
    """The reverse of to_disk(). Raises ValueError for a name that is not Unicode."""
    return (name.encode("utf-8") if UNICODE_DISK else os.fsencode(name)).decode("utf-8")


def numbered(name, number):
    """name-2.ext for name.ext and 2, and so on, no longer than a part may be."""
    stem, extension = os.path.splitext(name)
    if len(extension.encode("utf-8")) > NAME_LIMIT // 2:
        stem, extension = name, ""
    end = "-%d%s" % (number, extension)
    return stem.encode("utf-8")[:NAME_LIMIT - len(end.encode("utf-8"))].decode("utf-8", "ignore") + end


def numbered_start(name):
    """What all names begin with that numbered() makes of name."""
    return os.path.commonprefix([numbered(name, 2), numbered(name, 10 ** 8), numbered(name, 10 ** 9 - 1)])


def is_numbered(name, original):
    """Tell whether a name is one that numbered() makes of original."""
    numbers = map(int, re.findall(r"-([0-9]{1,9})(?=(?:\.[^.]*)?$)", name))
    return any(number > 1 and name == numbered(original, number) for number in numbers)


def long_path(path):
    """An absolute path as Windows takes it at any length; else it finds nothing from 260 characters on."""
    drive = os.path.splitdrive(path)[0]         # elsewhere there is none
    if not drive or path.startswith("\\\\?\\"):
        return path
    return "\\\\?\\" + ("UNC" + path[1:] if drive.startswith("\\\\") else path)


class Folder:
    """A folder held open, so that a link swapped in later can't lead out of it (openat(2), O_NOFOLLOW).

    Where the system has no descriptors of folders (Windows) the same calls take joined paths."""

    __slots__ = ("path", "fd")

    def __init__(self, path, fd=None):
        self.path = path            # None where a descriptor, got from another folder, does without
        self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY) if fd is None and HAS_DIR_FD else fd
        if self.fd is None:
            self.path = long_path(path)
            os.stat(self.path)      # it must be there, as where it is opened

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def close(self):
        if self.fd is not None:
            os.close(self.fd)

    def at(self, part):
        return to_disk(part) if self.fd is not None else os.path.join(self.path, part)

    def open(self, part, flags):
        if self.fd is None:                             # Windows: follows links, and says "denied" of a folder
            there = self.stat(part)
            kind = there and stat.S_IFMT(there.st_mode)
            if kind in (stat.S_IFLNK, stat.S_IFDIR):
                number = errno.ELOOP if kind == stat.S_IFLNK else errno.EISDIR
                raise OSError(number, os.strerror(number))
        return os.open(self.at(part), flags | OPEN_FLAGS, 0o666, dir_fd=self.fd)

    def stat(self, part):
        """What has that name, never followed if it is a link; None: nothing has."""
        try:
            return os.stat(self.at(part), dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def has(self, part, info):
        """Tell whether a name is still that of the file whose fstat() is info: another process may have moved it."""
        there = self.stat(part)
        return there is not None and os.path.samestat(there, info)

    def unlink(self, part):
        os.unlink(self.at(part), dir_fd=self.fd)

    def names(self, start="", refused=None):
        """What the folder holds that begins with start, but for names that no client could ask for: refused gets those."""
        found = os.listdir(self.path if self.fd is None else self.fd)
        for name in sorted(name for name in found if name.startswith(to_disk(start))):
            try:
                part, = split_name(from_disk(name))
                if to_disk(part) != name:               # Windows: made by other means than names of ours can be
                    raise ValueError
                yield part
            except (ValueError, Refusal):
                if refused is not None and name != PARTIAL:
                    refused.append(name)

    def inner(self, part, make=False, sync=False):
        """Open a folder in this one; never through a link. make: create it if there is none."""
        try:
            if self.fd is None:
                path = self.at(part)
                if not stat.S_ISDIR(os.lstat(path).st_mode) or os.path.normcase(os.path.realpath(path)) != \
                        os.path.normcase(os.path.join(os.path.realpath(self.path), part)):
                    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
                return Folder(path)
            return Folder(None, self.open(part, os.O_RDONLY | os.O_DIRECTORY))
        except FileNotFoundError:
            if not make:
                raise
        except OSError as error:
            if error.errno == errno.ELOOP:              # what some systems say of a link
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None
            raise
        with contextlib.suppress(FileExistsError):      # made meanwhile by another session: as good
            private = part == PARTIAL and os.name != "nt"       # there what moves out of it would stay private
            os.mkdir(self.at(part), 0o700 if private else 0o777, dir_fd=self.fd)
            self.sync(sync)
        return self.inner(part)

    def sync(self, wanted):
        if wanted and self.fd is not None:              # Windows can't and needn't flush a folder
            os.fsync(self.fd)


def descend(folder, parts, make=False, sync=False):
    """Open the folder that parts lead to from an open one, which is closed; step by step, never through a link."""
    for part in parts:
        with folder:
            folder = folder.inner(part, make, sync)
    return folder


def lock(fd):
    """Lock an open file against other processes; the system unlocks it however this one ends.

    Raises BlockingIOError or PermissionError where another has it."""
    try:
        if fcntl:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            os.lseek(fd, (1 << 31) - 1, os.SEEK_SET)    # as far behind most content as _locking() can: that stays readable
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
    except OSError as error:
        if error.errno not in UNSUPPORTED | {errno.ENOLCK}:             # a disk without locks
            raise
    finally:
        if not fcntl:
            os.lseek(fd, 0, os.SEEK_SET)


def age(info):
    """Seconds since a file was last written to, by its fstat(2); its stamps may be ahead of the clock.

    0 on Windows: a program that still has the file open may have written without a new stamp, and ctime is its birth."""
    if os.name == "nt":
        return 0
    now = time.time()
    return min(abs(now - info.st_mtime), abs(now - info.st_ctime))


def fresh(info):
    """Tell whether a file was written to so lately that its stamps may not show the next write."""
    return age(info) < (FRESH if info.st_mtime_ns % 10 ** 9 else SETTLED)       # whole seconds, as on FAT and ext3


class Download:
    """A regular file open for reading, and what it was when it was opened. Use it in a `with` block."""

    def __init__(self, fd):
        self.stat = os.fstat(fd)
        if not stat.S_ISREG(self.stat.st_mode):
            raise Refusal("not-a-file", "not a file (get -r fetches folders)")
        self.file = io.FileIO(fd, "rb")
        self.size, self.mtime = self.stat.st_size, self.stat.st_mtime
        self.moved, self.digest = 0, None
        self.known = None           # the SHA-256 of the whole, if it is remembered
        self.result = "ok"          # of the transfer, for the log
        self.fresh, self.settled = fresh(self.stat), age(self.stat) > SETTLED

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.file.close()

    def advance(self, offset, count):
        """Count bytes on their way out and return the new offset. Raises Refusal for 0 bytes: the file is shorter now."""
        if not count:
            raise Refusal("changed", "the file shrank while it was sent")
        self.moved += count
        return offset + count

    def identity(self):
        info = self.stat
        return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns

    def changed(self):
        """Tell whether somebody wrote to the file since it was opened.

        Writing changes ctime; so does losing a name to a newer file, which leaves the content as it was. What
        else changes it, as a new owner does, counts as writing: nobody could tell."""
        now = os.fstat(self.file.fileno())
        if (now.st_size, now.st_mtime_ns) != (self.stat.st_size, self.stat.st_mtime_ns):
            return True
        return now.st_nlink >= self.stat.st_nlink and now.st_ctime_ns != self.stat.st_ctime_ns

    def check(self, sha256, length):
        """Generator: raise Refusal if somebody wrote to the file since it was opened.

        A fresh one is read once more for that: sha256 is of its first length bytes, as they were read."""
        if self.fresh and (yield from hash_file(self.file, length)).hexdigest() != sha256 or self.changed():
            raise Refusal("changed", "the file changed while it was sent")


def hash_file(file, length):
    """Generator: the value is the SHA-256 of the first length bytes of a raw file. Raises Refusal where it is shorter."""
    digest = hashlib.sha256()
    file.seek(0)
    view = None
    for offset in range(0, length, CHUNK):
        yield COMPUTES
        view = view or memoryview(bytearray(min(length, CHUNK)))    # not sooner: hundreds may wait for their turn
        count = file.readinto(view[:length - offset])
        if count < min(CHUNK, length - offset):
            raise Refusal("changed", "the file shrank while it was read")
        digest.update(view[:count])
    return digest


def same_content(one, other):
    """Generator: compare two raw files, just opened; the value is True where they are the same."""
    while True:
        yield COMPUTES
        data = one.read(CHUNK)
        if data != other.read(CHUNK):
            return False
        if not data:
            return True


def nanoseconds(seconds):
    """A time as os.utime() takes it, so exact that a float read from one file comes out of the other the same."""
    whole, part = divmod(seconds, 1)
    return int(whole) * 10 ** 9 + round(part * 1e9)


def patiently(rename, *args, **where):
    """Call a function that renames a file; on Windows again, for a moment, where it may not: virus scanners open what is new."""
    for pause in (0.05, 0.1, 0.2, 0.4) if os.name == "nt" else ():
        with contextlib.suppress(PermissionError):
            return rename(*args, **where)
        time.sleep(pause)
    return rename(*args, **where)


class Upload:
    """A file on its way in: a partial file, to which publish() gives the final name.

    Use it in a `with` block. Unpublished, the partial stays for a resume where it has an id, else it goes."""

    def __init__(self, storage, parts, size, ident):
        self.storage, self.parts, self.size, self.ident = storage, parts, size, ident
        self.partial = ident or os.urandom(16).hex()
        self.length = self.moved = 0
        self.result = "ok"          # of the transfer, for the log
        self.digest, self.hashed = hashlib.sha256(), 0      # of so many first bytes; None: nobody verifies
        self.file = self.folder = self.target = None
        self.keep = bool(ident)     # the partial, for a resume
        try:
            self.open()
        except BaseException:
            self.__exit__()
            raise

    def open(self):
        """Open the folders and the partial; refuse now what could not be stored later."""
        self.target = self.storage.open_folder()
        self.folder = self.target.inner(PARTIAL, make=True)
        with contextlib.suppress(FileNotFoundError):            # publish() makes what is missing
            root, self.target = self.target, None
            self.target = descend(root, self.parts[:-1])
            if self.target.fd is not None:
                if not os.access(".", os.W_OK | os.X_OK, dir_fd=self.target.fd):
                    raise Refusal("denied", "no right to write there")
                if os.fstat(self.target.fd).st_dev != os.fstat(self.folder.fd).st_dev:
                    raise Refusal("denied", "another disk is mounted there")
            if self.storage.overwrite:
                self.check_replaceable()
        fd, self.length = self.open_partial()
        self.file = io.FileIO(fd, "rb+")
        missing = self.size - self.length
        if missing > CHUNK:
            disk = shutil.disk_usage(self.storage.upload)
            if disk.free < missing and disk.total:      # some network disks tell neither
                raise Refusal("disk-full", "no room for %d bytes" % self.size)

    def check_replaceable(self):
        """Raise Refusal where the name is that of something else than a file."""
        there = self.target.stat(self.parts[-1])
        if there and not stat.S_ISREG(there.st_mode):
            raise Refusal("not-a-file", "what has that name is not a file")

    def open_partial(self):
        """Open and lock the partial, made if there is none: (fd, its length)."""
        while True:
            fd = self.folder.open(self.partial, os.O_RDWR | os.O_CREAT | (0 if self.ident else os.O_EXCL))
            try:
                lock(fd)
                info = os.fstat(fd)
                named = not self.ident or os.name == "nt" or self.folder.has(self.partial, info)    # Windows keeps it
            except BaseException as error:
                os.close(fd)
                if not self.ident:
                    self.folder.unlink(self.partial)
                elif isinstance(error, (BlockingIOError, PermissionError)):
                    raise Refusal("busy", "another server is storing this file") from None
                raise
            if named and info.st_nlink < 2 and stat.S_ISREG(info.st_mode):
                return fd, info.st_size
            os.close(fd)
            if named:       # with 2 links: a server was killed before discard(), and writing would change the stored file
                self.folder.unlink(self.partial)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        try:
            if self.file and self.partial and not (self.keep and self.length):
                self.discard()
        finally:
            try:
                for opened in (self.file, self.folder, self.target):
                    if opened:
                        opened.close()      # the lock goes with the file
            finally:
                if self.ident:
                    del self.storage.claims[self.ident]

    def discard(self):
        partial, self.partial = self.partial, None
        if os.name == "nt":
            self.file.close()       # Windows neither removes nor renames an open file
        with contextlib.suppress(FileNotFoundError):
            self.folder.unlink(partial)

    def cut_back(self, offset):
        """Go on at byte offset of the partial; what it holds behind that is dropped."""
        self.file.truncate(offset)
        self.file.seek(offset)
        self.length = offset

    def hash_prefix(self):
        """Generator: hash what the partial holds already."""
        self.digest = yield from hash_file(self.file, self.length)
        self.hashed = self.length

    def write(self, view):
        """Append bytes to the partial, and to the digest if there is one."""
        if self.digest:
            self.digest.update(view)
        done = 0
        while done < len(view):
            done += self.append(self.file.write, view[done:])

    def write_from(self, pipe, count):
        """Append count bytes that wait in a pipe."""
        while count:
            try:
                count -= self.append(os.splice, pipe, self.file.fileno(), count)
            except OSError:             # perhaps the file's system can't do that: write(2) will do, or tell
                data = os.read(pipe, count)
                self.write(data)
                count -= len(data)

    def append(self, operation, *args):
        """Do an operation that appends to the partial; how many bytes it took."""
        try:
            count = operation(*args)
        except OSError as error:
            self.keep = self.keep and refusal_of(error).code != "disk-full"       # make room for others
            raise
        self.length += count
        self.moved += count
        return count

    def check(self, sha256):
        """Compare the digest with the sender's, where both have one, and return ours. Raises Refusal."""
        digest = self.digest.hexdigest() if self.digest else None
        if digest and sha256 and digest != sha256.lower():
            self.keep = False
            raise Refusal("mismatch", "the bytes that arrived have another SHA-256")
        return digest

    def flush(self):
        if self.storage.fsync:
            os.fsync(self.file.fileno())

    def publish(self, mtime=None):
        """Generator: flush the partial to disk and give it its final name, or drop it as a duplicate.

        Its value is (the name stored, whether the same content was there already)."""
        if os.name == "nt":             # an open file can't be renamed there, and its flush and its end set its time anew
            self.flush()
            self.file.close()
        if mtime is not None:
            with contextlib.suppress(OSError, OverflowError):           # a time that this system can't hold
                times = nanoseconds(time.time()), nanoseconds(mtime)    # the former for sweep()
                os.utime(self.file.fileno() if os.utime in os.supports_fd else self.folder.at(self.partial), ns=times)
        if os.name != "nt":
            self.flush()
        if not self.target:
            self.target = descend(self.storage.open_folder(), self.parts[:-1], True, self.storage.fsync)
        for name in self.candidates():
            stored = self.rename(name)
            if stored or (yield from self.same(name)):
                if not stored:
                    with contextlib.suppress(OSError):      # as in rename()
                        self.discard()
                self.target.sync(self.storage.fsync)
                if not stored or name != self.parts[-1]:
                    self.result = "ok, %s as %s" % ("stored" if stored else "already there", name)
                return "/".join(self.parts[:-1] + [name]), not stored
            yield COMPUTES                  # there may be thousands of numbered names

    def candidates(self):
        """Yield the names that may be given to it: its own, then the numbered ones, those first that are taken, as the same
        content may be there already."""
        name = self.parts[-1]
        yield name
        taken = {found for found in self.target.names(numbered_start(name)) if is_numbered(found, name)}
        yield from sorted(taken)
        for number in itertools.count(2):
            if numbered(name, number) not in taken:
                yield numbered(name, number)

    def rename(self, name):
        """Move the partial to its final name; False where that is taken."""
        source, target = self.folder.at(self.partial), self.target.at(name)
        where = {"src_dir_fd": self.folder.fd, "dst_dir_fd": self.target.fd}
        if os.name != "nt" and not self.folder.has(self.partial, os.fstat(self.file.fileno())):
            raise Refusal("server-error", "the partial file was tampered with")
        if self.storage.overwrite:
            self.check_replaceable()
            patiently(os.replace, source, target, **where)
            self.partial = None
            return True
        try:                                        # a link never replaces what is there
            os.link(source, target, follow_symlinks=os.link not in os.supports_follow_symlinks, **where)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in UNSUPPORTED | {errno.EPERM}:
                raise
            with self.storage.renaming:             # a disk without hard links (FAT): our sessions take turns
                if self.target.stat(name):
                    return False
                patiently(os.rename, source, target, **where)
            self.partial = None
            return True
        with contextlib.suppress(OSError):          # it is stored: of the old name sweep() will take care
            self.discard()
        return True

    def same(self, name):
        """Generator: compare the partial with a file beside it; the value is True for the same content."""
        try:
            there = self.target.stat(name)
            if not there or not stat.S_ISREG(there.st_mode) or there.st_size != self.length:
                return False
            other = io.FileIO(self.target.open(name, os.O_RDONLY), "rb")
        except (FileNotFoundError, PermissionError):            # gone meanwhile, or not for us
            return False
        with other, io.FileIO(self.folder.open(self.partial, os.O_RDONLY), "rb") as mine:
            return (yield from same_content(mine, other))


class Storage:
    """The two folders, and the rules for what goes in and out of them."""

    def __init__(self, upload, download, overwrite=False, fsync=True, max_size=None):
        self.upload, self.download = upload, download
        self.overwrite, self.fsync, self.max_size = overwrite, fsync, max_size
        self.claims = {}            # upload id under way here: (ticket, function that ends its session)
        self.tickets = itertools.count()
        self.renaming = threading.Lock()
        self.digests = collections.OrderedDict()        # Download.identity(): SHA-256
        self.next_sweep = 0.0

    def open_folder(self):
        """Open the upload folder. Raises Refusal where it is gone, as with a disk that isn't mounted any more."""
        try:
            return Folder(self.upload)
        except FileNotFoundError:
            raise Refusal("server-error", "the server's upload folder is gone") from None

    def open_download(self, name):
        """Open a regular file of the download folder. Raises Refusal or OSError."""
        *parents, last = split_name(name)
        try:
            with descend(Folder(self.download), parents) as folder:
                fd = folder.open(last, os.O_RDONLY)
        except NotADirectoryError:
            raise Refusal("not-found", "no such file") from None
        try:
            download = Download(fd)
        except BaseException:
            os.close(fd)
            raise
        download.known = None if download.fresh else self.digests.get(download.identity())
        return download

    def remember_digest(self, download, sha256):
        """Keep the digest of a file that hasn't changed lately, so that the next client's get is cheaper."""
        if download.settled:
            self.digests[download.identity()] = sha256
            while len(self.digests) > DIGESTS:
                self.digests.popitem(last=False)

    def open_upload(self, name, size, ident, give_way):
        """Generator: open the Upload of a put. give_way() ends the caller's session, should a newer one want the id."""
        parts = split_name(name)
        if self.max_size is not None and size > self.max_size:
            raise Refusal("too-large", "%d bytes, and at most %d are taken here" % (size, self.max_size))
        if time.monotonic() > self.next_sweep:
            self.sweep()
        if ident:
            yield from self.claim(ident, give_way)
        return Upload(self, parts, size, ident)

    def claim(self, ident, give_way):
        """Generator: make ident the caller's; whoever had it before is asked to give way and waited for. Raises Refusal."""
        mine, give_up = (next(self.tickets), give_way), time.monotonic() + TAKEOVER_TIME
        asked = mine                # whoever was asked last; at first nobody
        while True:
            holder, now = self.claims.setdefault(ident, mine), time.monotonic()         # one step: needs no lock
            if holder is mine:
                return
            if holder > mine or now > give_up:                  # tickets differ: what follows is never compared
                raise Refusal("busy", "another session is storing this file: try again in a moment")
            if holder is not asked:
                asked, patience = holder, now + TELL_TIME
                holder[1](at_once=False)
            elif now > patience:
                holder[1](at_once=True)
            time.sleep(0.001)
            yield BLOCKS            # a chance for others: who has it may need a worker to let go

    def make_folder(self, name):
        """Make a folder in the upload folder; one that is there already is as good."""
        parts = split_name(name)            # first: a folder opened before a refusal would stay open
        descend(self.open_folder(), parts, make=True, sync=self.fsync).close()

    def sweep(self):
        """Remove the partial files that nobody has touched for a day.

        The later of two stamps counts, access and writing, unless it is far ahead: publish() sets one to the sender's time."""
        self.next_sweep, now = time.monotonic() + SWEEP_EVERY, time.time()
        with self.open_folder() as root, root.inner(PARTIAL, make=True) as folder:
            for name in folder.names():
                with contextlib.suppress(OSError):      # locked, perhaps: under way
                    info = folder.stat(name)
                    stamps = (info.st_atime, info.st_mtime) if info else ()
                    ages = [now - stamp for stamp in stamps if stamp - now < PARTIAL_LIFE]
                    if ages and min(ages) > PARTIAL_LIFE:
                        with io.FileIO(folder.open(name, os.O_RDWR), "rb+") as file:
                            lock(file.fileno())
                            if os.name == "nt":         # there an open file can't be removed, and its name stays its own
                                file.close()
                            if os.name == "nt" or folder.has(name, os.fstat(file.fileno())):
                                folder.unlink(name)


class Listing:
    """What a folder holds, or all that is in it, as collect() finds it."""

    def __init__(self, root, path, recursive):
        self.root, self.recursive = root, recursive
        self.top = split_name(path) if path else []
        self.lines = bytearray()
        self.left_out = {}          # name: why it is there, but can't be served
        self.steps = 0              # since others could go first

    def collect(self):
        """Generator: look into the folder, and into those in it. Raises OSError."""
        todo = [self.top]
        while todo:
            parts = todo.pop()
            yield from self.step(len(parts) + 1)
            try:
                with descend(Folder(self.root), parts) as folder:
                    todo += reversed((yield from self.look_into(folder, parts)))
            except OSError as error:
                if parts == self.top:
                    raise
                self.leave_out(parts, error)

    def look_into(self, folder, parts):
        """Generator: add what is in an open folder; the value is the folders to look into next."""
        refused, folders = [], []
        if folder.fd is not None and os.fstat(folder.fd).st_size > BIG_FOLDER:
            yield LISTS
        for name in folder.names(refused=refused):
            yield from self.step(1)
            try:
                info = folder.stat(name)
            except OSError as error:
                if parts == self.top:
                    raise
                self.leave_out(parts + [name], error)
                continue
            if info and stat.S_ISDIR(info.st_mode):
                self.add(parts + [name], "dir", 0, info.st_mtime)
                folders.append(parts + [name])
            elif info and stat.S_ISREG(info.st_mode):
                self.add(parts + [name], "file", info.st_size, info.st_mtime)
        for name in refused:
            self.left_out["/".join(parts + [name])] = "no name that can be asked for"
        return folders if self.recursive else []

    def step(self, count):
        """Generator: let others go first where so much more is too much at a time."""
        self.steps += count
        if self.steps >= LISTED:
            self.steps = 0
            yield LISTS

    def add(self, parts, kind, size, mtime):
        name = "/".join(parts[len(self.top):])
        self.lines += encode({"name": name, "type": kind, "size": size, "mtime": mtime})

    def leave_out(self, parts, error):
        """Go on without what an OSError is about; raise it where, as without descriptors or with a read error, nobody
        knows what would be missing."""
        code = refusal_of(error).code
        if code == "denied":
            self.left_out["/".join(parts)] = error.strerror
        elif code not in ("not-found", "not-a-file"):           # these were removed meanwhile
            raise error

    def told(self):
        """What is left out, in words: no more of them than a header has room for."""
        some = ", ".join("%s (%s)" % item for item in itertools.islice(self.left_out.items(), 20))
        return some[:4000] + (" and %d more" % (len(self.left_out) - 20) if len(self.left_out) > 20 else "")


# ==== Messages: one JSON object a line (no I/O) ==========================================================

HEADER_LIMIT = 65536       # bytes of a header, its line end included
SIZE_LIMIT = 1 << 63
DIGITS_LIMIT = 1000
NESTING_LIMIT = 100
BRACKETS, NO_BRACKETS = bytes.maketrans(b"{[}]", b"\1\1\xff\xff"), bytes(set(range(256)) - set(b"[]{}"))
STRING = re.compile(rb'"(?:[^"\\]|\\.)*"?')      # one without an end too: else the search starts again at each quote
HEX = re.compile("[0-9a-fA-F]{64}")


def parse_int(digits):
    """int() for not too many digits: its time grows with their square."""
    if len(digits) > DIGITS_LIMIT:
        raise BadMessage("a number of %d digits" % len(digits))
    return int(digits)


def refuse_constant(name):
    raise BadMessage("%s is not JSON" % name)


def refuse_twins(pairs):
    """dict() for pairs whose keys differ."""
    message = dict(pairs)
    if len(message) < len(pairs):
        raise BadMessage("a key is there twice")
    return message


DECODER = json.JSONDecoder(parse_int=parse_int, parse_constant=refuse_constant, object_pairs_hook=refuse_twins)


def encode(message):
    """The line that stands for a message on the wire."""
    return json.dumps(message).encode("ascii") + b"\n"


def decode(line):
    """The message in a line. Raises BadMessage for all but one JSON object in UTF-8."""
    if line.count(b"[") + line.count(b"{") > NESTING_LIMIT:     # the parser recurses, and a thread's stack is small
        steps = memoryview(STRING.sub(b"", line).translate(BRACKETS, NO_BRACKETS)).cast("b")    # 1 down, -1 up
        if max(itertools.accumulate(steps), default=0) > NESTING_LIMIT:
            raise BadMessage("nested too deeply")
    try:
        text = line.decode("utf-8").strip(" \t\r\n")
        message, end = DECODER.raw_decode(text)
        if end < len(text):
            raise ValueError("more than one value")
    except (ValueError, RecursionError) as error:
        raise BadMessage("not JSON: %s" % error) from None
    if not isinstance(message, dict):
        raise BadMessage("not a JSON object")
    return message


def is_size(value):
    return type(value) is int and 0 <= value < SIZE_LIMIT       # bool is an int too, for isinstance()


def is_time(value):
    return type(value) in (int, float) and value - value == 0   # neither infinite nor NaN


def is_digest(value):
    return value is None or isinstance(value, str) and HEX.fullmatch(value) is not None


FIELDS = {                 # name: (what it must be, the check, what it is when it is left out; ... = it must be there)
    "name": ("a string", lambda value: isinstance(value, str), ...),
    "path": ("a string", lambda value: isinstance(value, str), ""),
    "size": ("an integer from 0 to 2^63-1", is_size, ...),
    "offset": ("an integer from 0 to 2^63-1", is_size, 0),
    "mtime": ("a number of seconds", lambda value: value is None or is_time(value), None),
    "id": ("64 hex digits", is_digest, None),
    "sha256": ("64 hex digits", is_digest, None),
    "verify": ("true or false", lambda value: isinstance(value, bool), True),
    "recursive": ("true or false", lambda value: isinstance(value, bool), False),
    "duplicate": ("true or false", lambda value: isinstance(value, bool), False),
    "left_out": ("a string", lambda value: isinstance(value, str), ""),
}


def fields(message, *names):
    """The values of a message's fields. Raises BadMessage where one is missing or not what it must be."""
    values = []
    for name in names:
        kind, check, default = FIELDS[name]
        value = message.get(name, default)
        if not check(value):
            raise BadMessage("%r must be %s" % (name, kind))
        values.append(value)
    return values


# ==== Classic messages: verb|name|number, without an end =================================================

def parse_classic(data):
    """Split a classic request into (verb, name, number); None while it is incomplete.

    Raises BadMessage as soon as no further byte can make it a request."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(data)
    except ValueError:
        raise BadMessage("not UTF-8") from None
    verb, bar, rest = text.partition("|")
    if not bar and any(known.startswith(verb) for known in CLASSIC):
        return None
    name, bar, number = rest.partition("|")
    well = name and re.fullmatch("-?[0-9]*" if verb == "get" else "[0-9]*", number)
    if verb not in CLASSIC or len(data) > PATH_LIMIT + 64 or bar and not well:
        raise BadMessage("not a request")
    if number in ("", "-"):
        return None
    return verb, name, parse_int(number) if verb == "put" else 0


# ==== Waiting: two traps, and the wire built on them =====================================================

@types.coroutine
def ready(sock, event, timeout, kind):
    """Pause until sock is ready for event; socket.timeout is raised here after timeout seconds.

    kind: that of the work that comes then, as for announce(), if it is more than an operation on the socket; else None."""
    yield sock, event, timeout, kind


@types.coroutine
def announce(kind):
    """Pause until it is the session's turn for a kind of work, one of those AT_ONCE. The turn lasts until its next pause.

    The event loop hands the session to a worker thread for that; a session with a thread of its own stays in it."""
    yield kind


def is_loopback(host):
    """Tell whether host, an address in numbers, leads back to this machine."""
    return host == "::1" or host.startswith(("127.", "::ffff:127."))


def tune(sock, peer):
    """Set what both ends of a connection want of their sockets; peer is the other end's address."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if os.name == "nt":             # there an urgent byte makes select() return at once until somebody has read it
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    if is_loopback(peer):           # elsewhere the system's own tuning is better
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, LOOPBACK_BUFFER)


def unsent(sock):
    """Bytes that the system has still to send (tty_ioctl(4), tcp(7)); 0 where it doesn't tell."""
    try:
        return int.from_bytes(fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder) if fcntl else 0
    except OSError:
        return 0


class Wire:
    """A client's non-blocking socket, with the bytes read ahead and the answers not yet sent."""
    __slots__ = ("sock", "timeout", "deadline", "ahead", "owed", "cut")

    def __init__(self, sock, timeout):
        self.sock, self.timeout = sock, timeout
        self.deadline = math.inf    # time.monotonic() at which a wait ends even if bytes still come, as for a header
        self.ahead = bytearray()
        self.owed = bytearray()
        self.cut = None             # what ended it from outside, see ended()

    async def attempt(self, event, operation, *args, kind=None):
        """Wait until the socket is ready, then do the non-blocking operation and return its value.

        kind: SENDS for sendfile(2), which may wait for a disk though the socket is ready; else None.
        It waits even where data is likely there: so one fast client can't keep the others from theirs.
        Raises TimedOut, or Gone for any error of the socket."""
        left, start = None, time.monotonic()        # left: bytes unsent at the last look
        slow_is_fine = event == WRITE and self.deadline == math.inf     # as long as the peer takes something
        while True:
            # The first look comes after an eighth of the time: one before each send would cost a system call.
            limit = self.timeout / 8 if slow_is_fine and left is None else self.timeout
            patience = min(start + limit, self.deadline) - time.monotonic()
            try:
                if self.cut and not (event == WRITE and isinstance(self.cut, Refusal)):     # an answer under way goes first
                    raise ConnectionAbortedError
                if patience <= 0:
                    raise socket.timeout
                await ready(self.sock, event, min(patience, WAKE), kind)
                return operation(*args)
            except BlockingIOError:
                pass
            except socket.timeout as error:
                if patience > WAKE and not error.errno:     # else it is the system's: the other machine is gone
                    continue
                left, before, start = unsent(self.sock), left, time.monotonic()
                if slow_is_fine and (before is None or left < before):
                    continue        # a socket is writable again only when much of its queue is gone
                await announce(BLOCKS)      # what this ends closes and removes files
                if event == WRITE:
                    raise Gone("it has read nothing for %g seconds" % self.timeout) from None
                raise TimedOut("nothing moved for %g seconds" % self.timeout if self.deadline == math.inf
                               else "a header was not complete in time") from None
            except OSError as error:
                raise await self.ended(error.strerror) from None

    async def ended(self, why):
        """The error to raise where the session ends: what ended it from outside, else Gone."""
        await announce(BLOCKS)      # what this ends closes and removes files
        cut = self.cut
        if isinstance(cut, Refusal):
            self.cut = None         # the client is told of it: for that the wire is needed
            return cut
        return Gone(cut or why)

    async def receive(self, operation, *args):
        """Do a reading operation, after all that is owed was sent. Raises Gone at the end of the stream."""
        if self.owed:
            await self.flush()
        got = await self.attempt(READ, operation, *args)
        if not got:
            raise await self.ended("the client closed the connection")
        return got

    async def fill(self):
        """Read more of the stream ahead."""
        self.ahead += await self.receive(self.sock.recv, CHUNK)

    async def peek(self):
        """Wait for the next byte and return it unread."""
        if not self.ahead:
            await self.fill()
        return self.ahead[:1]

    async def read_line(self):
        """Read one header, to be complete HEADER_TIME after its first byte. Raises Refusal if too long."""
        await self.peek()
        if self.owed and b"\n" not in self.ahead:
            await self.flush()          # now: a peer that is slow to read must not lose the time for its header
        self.deadline = time.monotonic() + HEADER_TIME
        while True:
            end = self.ahead.find(b"\n", 0, HEADER_LIMIT) + 1
            if end:
                self.deadline = math.inf
                return self.take(end)
            if len(self.ahead) >= HEADER_LIMIT:
                raise BadMessage("a header is longer than %d bytes" % HEADER_LIMIT)
            await self.fill()

    def take(self, count):
        """Take count bytes, or as many as there are, of what was read ahead."""
        data = bytes(self.ahead[:count])
        del self.ahead[:count]
        return data

    async def send(self, data):
        """Send bytes, later if they are few: small answers travel together."""
        if len(self.owed) + len(data) <= JOIN:
            self.owed += data
        else:
            await self.flush()
            await self.send_now(data)

    async def flush(self):
        """Send all that is owed."""
        data, self.owed = self.owed, bytearray()
        await self.send_now(data)

    async def send_now(self, data):
        view, sent = memoryview(data), 0
        while sent < len(view):
            sent += await self.attempt(WRITE, self.sock.send, view[sent:sent + SLICE])

    def sendfile(self, fd, offset, count):
        """sendfile(2): how many bytes went, 0 behind the file's end, None where the file's system can't do that."""
        try:
            return os.sendfile(self.sock.fileno(), fd, offset, count)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            return None

    def splice(self, pipe, count):
        """Move at most count bytes into an empty pipe; how many."""
        try:
            return os.splice(self.sock.fileno(), pipe, count)
        except OSError:             # urgent data in the way, or no such call here: recv(2) will do, or tell
            return os.write(pipe, self.sock.recv(min(count, select.PIPE_BUF)))

    async def linger(self):
        """Let the peer read the last answer before the socket goes: unread bytes would make that a reset."""
        self.deadline = time.monotonic() + LINGER_TIME
        with contextlib.suppress(OSError, TimedOut):
            await self.flush()
            self.sock.shutdown(socket.SHUT_WR)
            while await self.attempt(READ, self.sock.recv, CHUNK):
                pass


# ==== Session: one client from hello to goodbye ===========================================================

def address_text(address):
    """HOST:PORT, an IPv6 host in brackets."""
    return ("[%s]:%d" if ":" in address[0] else "%s:%d") % address[:2]


class Session:
    """One client's conversation. All that is known about it is here, and nowhere on the server.

    run() is a coroutine; whoever drives it lets it go on when the wait that it asked for is over."""
    __slots__ = ("service", "storage", "wire", "peer", "full", "framed", "doing", "payload", "answering",
                 "resumed", "told")

    def __init__(self, service, sock, address, full):
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            tune(sock, address[0])
        self.service, self.storage = service, service.storage
        self.wire = Wire(sock, min(service.timeout, HEADER_TIME) if full else service.timeout)
        self.peer = address_text(address)
        self.full = full            # whether this is one client too many, as its first request will be told
        self.framed = False         # the dialect of the last request
        self.doing = "request"      # what it asks for, for the log
        self.payload = None         # bytes of a put still to come before its last line; None: no put
        self.answering = False      # between the first and the last line of an answer
        self.told = False           # whether the log tells already what went wrong
        self.resumed = None         # the Upload that a resume left open for the put to come

    def cut(self, why):
        """End the session from outside, from any thread: its next wait is over, as if the client had left."""
        self.wire.cut = why
        with contextlib.suppress(OSError):
            self.wire.sock.shutdown(socket.SHUT_RDWR)

    def give_way(self, at_once):
        """End the session for a newer one that stores the same file. A client that still sends something is told."""
        if at_once:
            self.cut("a newer session took over")
        else:
            self.wire.cut = Refusal("busy", "a newer session took over", closes=True)

    async def run(self):
        """Serve the client until one of the two has enough."""
        LOG.info("%s connected", self.peer)
        try:
            start = time.monotonic()
            while await self.do_request():
                if time.monotonic() - start > self.service.run_time():      # more may be here already: others go first
                    await self.wire.flush()
                    start = time.monotonic()
            await self.let_go()
            await self.wire.linger()
        except (Gone, Refusal) as why:
            LOG.info("%s left: %s", self.peer, why)
        finally:
            self.drop_resumed()

    async def do_request(self):
        """Serve one request, whatever happens; True where the conversation can go on."""
        try:
            if self.payload is not None and not await self.skip_payload():
                return False
            self.payload, self.answering, self.doing, self.told = None, False, "request", False
            if not self.wire.ahead:
                self.service.asking.discard(self)
            first = await self.wire.peek()
            self.service.asking.add(self)
            self.framed = first == b"{" or self.framed and first not in (b"p", b"g")
            if self.full:
                text = "%d clients are served already: try again later" % self.service.max_clients
                raise Refusal("busy", text, closes=True)
            if self.framed and first != b"{":           # nonsense, whatever follows
                raise Refusal("bad-request", "a message must begin with {", closes=True)
            await (self.do_framed() if self.framed else self.do_classic())
            self.payload = None
            return True
        except Refusal as refusal:
            return await self.refuse(refusal)
        except OSError as error:
            return await self.refuse(refusal_of(error))
        except Gone:
            raise
        except Exception:           # a bug: it ends this session only
            LOG.exception("%s bug", self.peer)
            return await self.refuse(Refusal("server-error", "internal error", closes=True))

    async def in_slices(self, work):
        """Run a generator of file work to its end and return its value.

        At each yield, whose value is the kind of the work that comes next, others may go first."""
        kind = BLOCKS
        while True:
            await announce(kind)
            try:
                kind = work.throw(await self.wire.ended("")) if self.wire.cut else next(work)
            except StopIteration as end:
                return end.value

    async def refuse(self, refusal):
        """Tell the client why not; True where the conversation can go on."""
        if not self.told:
            idle = isinstance(refusal, TimedOut) and self.doing == "request" and not self.wire.ahead
            LOG.log(logging.INFO if idle else logging.WARNING, "%s %s refused: %s: %s", self.peer, self.doing, refusal.code,
                    refusal)
        if self.answering or not self.framed:
            return False            # no way to say it but to close before the end
        await self.wire.send(encode({"ok": False, "code": refusal.code, "error": str(refusal)}))
        return not refusal.closes and (self.payload or 0) <= SKIP_LIMIT

    async def skip_payload(self):
        """Read past what is still to come of a refused put; False where that has no end."""
        try:
            while self.payload:
                await self.wire.peek()
                self.payload -= len(self.wire.take(self.payload))
            await self.wire.read_line()
            return True
        except Refusal:             # the put has its answer already
            return False

    @contextlib.contextmanager
    def logged(self, file):
        """Write one line about the transfer in the block, however it ends."""
        start, level = time.perf_counter(), logging.INFO        # Windows' monotonic() may have steps of 16 ms
        try:
            yield
            result = file.result
        except BaseException as error:
            level, result, self.told = logging.WARNING, "failed: %s" % error, True
            raise
        finally:
            seconds = time.perf_counter() - start
            LOG.log(level, "%s %s %d bytes %.3f s %.1f MB/s %s",
                    self.peer, self.doing, file.moved, seconds, file.moved / 1e6 / max(seconds, 1e-6), result)

    # ---- framed ----

    async def read_header(self):
        """Read one message. What is none ends the conversation: who knows where the next begins?"""
        try:
            line = await self.wire.read_line()
            if len(line) > LONG_HEADER:
                await announce(PARSES)
            return decode(line)
        except BadMessage as error:
            error.closes = True
            await announce(BLOCKS)      # what this ends closes and removes files
            raise

    async def do_framed(self):
        """Read one header and do what it asks."""
        ask = await self.read_header()
        command = COMMANDS.get(ask["cmd"]) if isinstance(ask.get("cmd"), str) else None
        if command is None:
            raise BadMessage("'cmd' must be one of: %s" % " ".join(COMMANDS))
        self.doing = ("%s %s" % (ask["cmd"], ask.get("name", ask.get("path", ""))))[:300]
        await command(self, ask)

    async def reply(self, **message):
        await self.wire.send(encode(dict(message, ok=True)))

    async def do_hello(self, ask):
        await self.reply(server="ftp_server", version=VERSION, mode=self.service.mode, protocol=2,
                         max_size=self.storage.max_size)

    async def do_ls(self, ask):
        path, recursive = fields(ask, "path", "recursive")
        listing = Listing(self.storage.download, path, recursive)
        try:
            await self.in_slices(listing.collect())
        except NotADirectoryError:
            raise Refusal("not-a-file", "not a folder") from None
        LOG.debug("%s ls %s %d bytes", self.peer, path or "/", len(listing.lines))
        more = {}
        if recursive and listing.left_out:      # whoever wants all must know
            more["left_out"] = listing.told()
            LOG.warning("%s ls %s leaves out: %s", self.peer, path or "/", more["left_out"])
        await self.reply(size=len(listing.lines), **more)
        self.answering = True
        await self.wire.send(listing.lines)

    async def do_get(self, ask):
        name, offset, sha256, verify = fields(ask, "name", "offset", "sha256", "verify")
        await announce(BLOCKS)
        with self.storage.open_download(name) as download, self.logged(download):
            offset = await self.common_prefix(download, offset, sha256)
            await self.reply(size=download.size, offset=offset, mtime=download.mtime)
            self.answering = True
            whole = await self.send_content(download, offset, download.size, verify)
            self.answering = False
            await self.in_slices(download.check(whole, download.size))
            if whole:
                self.storage.remember_digest(download, whole)
            await self.reply(sha256=whole if verify else None)

    async def common_prefix(self, download, offset, sha256):
        """offset, if the client's bytes up to there are ours too (their hash goes on in download.digest), else 0."""
        if not offset or offset > download.size or not sha256:
            return 0
        known = download.known if offset == download.size else None
        if not known:
            download.digest = await self.in_slices(hash_file(download.file, offset))
            known = download.digest.hexdigest()
        if known == sha256.lower():
            return offset
        download.digest = None
        return 0

    async def send_content(self, download, offset, stop, verify):
        """Send a file from offset to stop; the SHA-256 of all up to there, if that is wanted or the file is fresh."""
        digest = None
        if download.fresh or verify and not download.known:
            digest = download.digest or hashlib.sha256()
        self.service.senders.add(self)
        try:
            if not digest and stop - offset > JOIN and hasattr(os, "sendfile"):
                offset = await self.send_unread(download, offset, stop)
            await self.send_read(download, offset, stop, digest)
        finally:
            self.service.senders.discard(self)
        return digest.hexdigest() if digest else download.known

    async def send_unread(self, download, offset, stop):
        """Send a file from offset to stop without reading it, as far as the system can; the offset where that ended."""
        await self.wire.flush()
        while offset < stop:
            count = min(stop - offset, self.service.slice())
            sent = await self.wire.attempt(WRITE, self.wire.sendfile, download.file.fileno(), offset, count, kind=SENDS)
            if sent is None:
                break
            offset = download.advance(offset, sent)
        return offset

    async def send_read(self, download, offset, stop, digest):
        """Send a file from offset to stop by reading it; hash it on the way if there is a digest."""
        view = None
        download.file.seek(offset)
        kind = COMPUTES if stop - offset > SMALL else BLOCKS
        while offset < stop:
            await announce(kind)
            view = view or memoryview(bytearray(min(CHUNK, stop - offset)))     # not sooner: hundreds may wait for their turn
            count = download.file.readinto(view[:stop - offset])
            offset = download.advance(offset, count)
            if digest:
                digest.update(view[:count])
            await self.wire.send(view[:count])

    async def do_resume(self, ask):
        name, size, ident = fields(ask, "name", "size", "id")
        if not ident:
            raise BadMessage("'id' must be 64 hex digits")
        await self.let_go()
        self.resumed = upload = await self.in_slices(self.storage.open_upload(name, size, ident.lower(), self.give_way))
        try:
            if upload.length > size:
                upload.cut_back(0)
            await self.in_slices(upload.hash_prefix())
        except (OSError, Refusal):
            self.drop_resumed()
            raise
        await self.reply(offset=upload.length, sha256=upload.digest.hexdigest())

    async def let_go(self):
        """Close what a resume left open for a put that doesn't come."""
        if self.resumed:
            await announce(BLOCKS)
            self.drop_resumed()

    def drop_resumed(self):
        upload, self.resumed = self.resumed, None
        try:
            if upload:
                upload.__exit__()
        except OSError as error:
            LOG.warning("%s a partial file stays: %s", self.peer, error.strerror)

    async def do_put(self, ask):
        self.payload = math.inf         # as long as nobody can tell where it ends
        size, offset = fields(ask, "size", "offset")
        if offset > size:
            raise BadMessage("'offset' must not be larger than 'size'")
        if offset and not ask.get("id"):
            raise BadMessage("'offset' must be 0 without an 'id'")
        self.payload = size - offset
        name, ident, mtime, verify = fields(ask, "name", "id", "mtime", "verify")
        with await self.upload_of(name, size, ident and ident.lower()) as upload, self.logged(upload):
            await self.go_on_at(upload, offset, verify)
            await self.receive(upload)
            last = await self.read_header()
            self.payload = None
            await announce(BLOCKS)
            sha256, = fields(last, "sha256")
            digest = upload.check(sha256)
            stored, duplicate = await self.in_slices(upload.publish(mtime))
        await self.reply(name=stored, size=size, sha256=digest, duplicate=duplicate)

    async def upload_of(self, name, size, ident):
        """The Upload that a resume has left open, if it is this one, else a new one."""
        upload = self.resumed
        if upload and ident == upload.ident and size == upload.size and split_name(name) == upload.parts:
            self.resumed = None
            return upload
        await self.let_go()
        return await self.in_slices(self.storage.open_upload(name, size, ident, self.give_way))

    async def go_on_at(self, upload, offset, verify):
        """Make the upload ready for the byte at offset."""
        if offset > upload.length:
            raise Refusal("mismatch", "there are only %d bytes to go on from, not %d" % (upload.length, offset))
        if upload.length:
            await announce(BLOCKS)
            upload.cut_back(offset)
        if not verify:
            upload.digest = None
        elif upload.hashed != offset:
            await self.in_slices(upload.hash_prefix())

    async def receive(self, upload):
        """Move the payload from the wire into the upload."""
        if self.wire.ahead:         # a small file is all here
            await announce(BLOCKS)
            data = self.wire.take(self.payload)
            self.payload -= len(data)
            upload.write(data)
        if self.payload and not upload.digest and hasattr(os, "splice"):
            await self.receive_unread(upload)
        view, filled = memoryview(bytearray(min(RECEIVE, self.payload))), 0
        try:
            while self.payload:
                count = await self.read_for(WRITE_TIME if filled else math.inf, view[filled:filled + self.payload])
                self.payload -= count
                filled += count
                if filled == len(view) or not self.payload or not count:
                    piece, filled = view[:filled], 0
                    await announce(COMPUTES)
                    upload.write(piece)
        finally:
            if filled:              # what came before a connection broke needn't come again
                upload.write(view[:filled])

    async def receive_unread(self, upload):
        """Move the payload into the upload through a pipe by splice(2): nobody looks at it, so nobody copies it."""
        try:
            pipe, end = os.pipe()
        except OSError:             # out of descriptors: it is read as if there were no splice(2)
            return
        try:
            with contextlib.suppress(OSError):      # the system limits what all pipes of a user hold together
                fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, PIPE)
            while self.payload:
                count = await self.wire.receive(self.wire.splice, end, self.payload)
                self.payload -= count
                await announce(COMPUTES)
                upload.write_from(pipe, count)
        finally:
            os.close(pipe)
            os.close(end)

    async def read_for(self, patience, view):
        """Read into view; how many bytes came, 0 where none did for patience seconds."""
        self.wire.deadline = time.monotonic() + patience
        try:
            return await self.wire.receive(self.wire.sock.recv_into, view)
        except TimedOut:
            if patience == math.inf:
                raise
            return 0
        finally:
            self.wire.deadline = math.inf

    async def do_mkdir(self, ask):
        name, = fields(ask, "name")
        await announce(BLOCKS)
        self.storage.make_folder(name)
        LOG.info("%s mkdir %s ok", self.peer, name)
        await self.reply(name=name)

    # ---- classic ----

    async def do_classic(self):
        """Read one classic request and do what it asks."""
        verb, name, size = await self.read_classic()
        self.doing = "%s %s" % (verb, name)
        await CLASSIC[verb](self, name, size)

    async def read_classic(self):
        """Read a request that has no end: it is over when nothing more arrives for QUIET_TIME."""
        await self.wire.flush()         # first: the time limit is not for what is owed
        give_up = time.monotonic() + HEADER_TIME
        while True:
            request = parse_classic(self.wire.ahead)
            self.wire.deadline = min(give_up, time.monotonic() + QUIET_TIME) if request else give_up
            try:
                await self.wire.fill()
            except (TimedOut, Gone):            # Gone: the client has said all that it wants to say
                if not request or time.monotonic() > give_up:
                    raise
                self.wire.deadline = math.inf
                self.wire.ahead.clear()
                return request

    async def classic_put(self, name, size):
        with await self.in_slices(self.storage.open_upload(name, size, None, self.give_way)) as upload, self.logged(upload):
            self.payload, upload.digest = size, None
            await self.wire.send(b"OK")
            await self.receive(upload)
            await self.in_slices(upload.publish())

    async def classic_get(self, name, size):
        await announce(BLOCKS)
        try:
            download = self.storage.open_download(name)
        except (Refusal, OSError) as error:
            LOG.warning("%s %s refused: %s", self.peer, self.doing, getattr(error, "strerror", error))
            return await self.wire.send(b"NO|0")
        with download, self.logged(download):
            await self.wire.send(b"YES|%d" % download.size)
            await self.expect(b"second_active")
            last = max(0, download.size - 1)        # the last byte is held back until it is sure that all fit together
            sent = await self.send_content(download, 0, last, verify=False)
            await announce(BLOCKS)
            download.file.seek(last)
            end = download.file.read(download.size - last)
            await self.in_slices(download.check(sent, last))
            await self.wire.send(end)
            download.moved += len(end)

    async def expect(self, text):
        """Read the given bytes. Raises Refusal as soon as something else comes."""
        await self.wire.flush()
        await self.wire.peek()
        self.wire.deadline = time.monotonic() + HEADER_TIME
        for byte in text:
            if (await self.wire.peek())[0] != byte:
                raise BadMessage("%r expected" % text)
            self.wire.take(1)
        self.wire.deadline = math.inf


COMMANDS = {"hello": Session.do_hello, "ls": Session.do_ls, "get": Session.do_get, "resume": Session.do_resume,
            "put": Session.do_put, "mkdir": Session.do_mkdir}
CLASSIC = {"put": Session.classic_put, "get": Session.classic_get}


class Service:
    """What the sessions of a server share, whichever way they are run."""

    def __init__(self, mode, storage, timeout, max_clients):
        self.mode, self.storage, self.timeout, self.max_clients = mode, storage, timeout, max_clients
        self.stopping = False
        self.sessions, self.served = set(), 0       # served: how many of them are not one too many (Session.full)
        self.asking = set()                         # sessions with a request under way
        self.senders = set()                        # those of them that send a file just now
        self.left = threading.Condition()           # guards sessions; notified when the last one ends
        self.room = room_for_clients()
        self.reserve = os.open(os.devnull, os.O_RDONLY)

    def welcome(self, sock, address):
        """A new Session for a connection."""
        with self.left:
            session = Session(self, sock, address, self.served >= self.max_clients)
            self.sessions.add(session)
            self.served += not session.full
        if self.stopping:
            session.cut("the server stops")
        return session

    def farewell(self, session):
        with self.left:
            self.sessions.discard(session)
            self.asking.discard(session)
            self.served -= not session.full
            if not self.sessions:
                self.left.notify_all()

    def run_time(self):
        """Seconds for which a session may answer one request after another: the fewer, the more have one under way."""
        return min(RUN_TIME, ROUND / max(1, len(self.asking)))

    def slice(self):
        """Bytes that one of the senders may send at a time: small slices of many keep nobody waiting."""
        return max(SLICE, TURN // len(self.senders))

    def cut_all(self, give_up):
        """End what is under way, until time.monotonic() is give_up, and forget the sessions that wait for a request:
        thousands of threads that wake at once would keep each other and us from ending. True where there were none."""
        with self.left:
            for session in self.sessions:
                session.wire.cut = "the server stops"       # first: what begins from now on ends at its first wait
            idle = {session for session in self.sessions if session.doing == "request" and not session.resumed}
            self.sessions -= idle
            busy = list(self.sessions)
        for session in busy:                                # not while we hold what they need to end
            if time.monotonic() < give_up:
                session.cut("the server stops")
        return not idle

    def accept(self, listener):
        """Accept a connection: (socket, address), or None."""
        try:
            sock, address = listener.accept()
        except (BlockingIOError, ConnectionError):      # nobody is waiting, or not any more
            return None
        except OSError as error:
            LOG.error("can't take a new client: %s", error.strerror)
            return self.use_reserve(listener) if refusal_of(error).code == "busy" else None     # else it is gone
        if len(self.sessions) < self.room:
            return sock, address or ("?", 0)            # macOS: gone again already
        LOG.error("no room for one more client")
        return turn_away(sock)

    def use_reserve(self, listener):
        """accept() failed, as we are out of descriptors, and would fail at once and forever: with the one kept in reserve
        we can tell the client."""
        if self.reserve is None:
            time.sleep(TICK)
        else:
            os.close(self.reserve)
            self.reserve = None
            with contextlib.suppress(OSError):
                turn_away(listener.accept()[0])
        with contextlib.suppress(OSError):
            self.reserve = os.open(os.devnull, os.O_RDONLY)


def room_for_clients():
    """How many may be connected so that descriptors are left for the files of those who are."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if resource else -1
    if limit < 0:                   # there is none
        return SELECTED
    return min(SELECTED, limit - max(min(SPARE, limit // 2), limit // 4))


def turn_away(sock):
    """Tell a client that there is no room for it, as far as that goes without waiting, and close."""
    with sock, contextlib.suppress(OSError):
        sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            sock.recv(CHUNK)                        # unread bytes would turn the close into a reset
        sock.send(encode({"ok": False, "code": "busy", "error": "the server has no room left: try again later"}))
        sock.shutdown(socket.SHUT_WR)


def tune_listener(sock, host):
    """Set what both backends want of the sockets that they bind, before that."""
    if sock.type == socket.SOCK_STREAM:     # on Windows SO_REUSEADDR would share the port
        sock.setsockopt(socket.SOL_SOCKET, getattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_REUSEADDR), 1)
    if host == "::":
        level = getattr(socket, "IPPROTO_IPV6", 41)     # Python has its name on Windows since 3.8
        sock.setsockopt(level, socket.IPV6_V6ONLY, 0)   # everybody, IPv4 too
    sock.setblocking(False)         # what arrived may be gone before we get to it. Last: Python 3.6 changes sock.type


# ==== Discovery: where is a server? One datagram, one answer ===============================================

class Discovery:
    """Gives the answers: never longer than the request, so that nobody can be flooded through us with forged
    requests, and few in a second."""

    def __init__(self, service, port_number):
        self.message = encode({"ok": True, "server": "ftp_server", "host": socket.gethostname()[:64],
                               "port": port_number, "mode": service.mode})
        self.lock = threading.Lock()
        self.times = collections.deque([-math.inf] * DISCOVERY_RATE, DISCOVERY_RATE)    # of the last answers

    def answer(self, data, sock, address):
        """Answer a datagram, if it is a request and not one too many."""
        try:
            asked = len(data) >= max(DISCOVERY_SIZE, len(self.message)) and decode(data).get("cmd") == "discover"
        except BadMessage:
            return
        now = time.monotonic()
        with self.lock:
            if not asked or now - self.times[0] < 1:
                return
            self.times.append(now)
        with contextlib.suppress(OSError):      # no way to the one who asks
            sock.sendto(self.message, address)


# ==== Backend: socketserver, a thread for each client =====================================================

def wait_for(sock, events, seconds):
    """Wait until a socket is ready for READ or WRITE, whichever are in events; which it is, 0 after some seconds."""
    end = time.monotonic() + seconds
    while not HAS_POLL:                 # short waits: there Ctrl-C ends none
        left = max(0, end - time.monotonic())
        readable, writable, broken = select.select([sock][:events & READ], [sock][:events & WRITE], [sock], min(left, 0.1))
        if readable or writable or broken or not left:
            return events if broken else READ * len(readable) | WRITE * len(writable)
    poller = select.poll()
    poller.register(sock, select.POLLIN * bool(events & READ) | select.POLLOUT * bool(events & WRITE))
    for _, flags in poller.poll(seconds * 1000):        # an error is ready for both
        return events & (READ * (flags != select.POLLOUT) | WRITE * (flags != select.POLLIN))
    return 0


class Turns:
    """Only so many do some kind of work at a time; the others wait in line.

    Whoever takes longer than `seconds`, as for a disk that hangs, isn't counted any more, and others go instead. Each time
    that is seen the limit doubles, up to MOST, since they may hang too; after STUCK seconds without it is as before."""

    def __init__(self, limit, seconds):
        self.lock, self.seconds = threading.Lock(), seconds
        self.limit = self.least = limit
        self.late = -math.inf       # time.monotonic() when somebody was last seen to stand still
        self.begun = {}             # who has a turn, of those that count: time.monotonic() when it began
        self.line = collections.deque()     # it is empty where there is room for more

    def take(self, who):
        """Return True if who may go at once; else it waits in line until end() or relieve() returns it."""
        with self.lock:
            self.line.append(who)
            return bool(self.fill())

    def fill(self):
        """Give turns to the first in line, as far as there is room, and return who they are."""
        going = []
        while self.line and len(self.begun) < self.limit:
            going.append(self.line.popleft())
            self.begun[going[-1]] = time.monotonic()
        return going

    def keep(self, who):
        """True if who may go on, as nobody is in line. It isn't standing still, so its time starts anew."""
        with self.lock:
            if not self.line:
                self.begun[who] = time.monotonic()
            return not self.line

    def end(self, who):
        """End the turn of who, and return those who go next."""
        with self.lock:
            self.begun.pop(who, None)       # gone already where it stood still
            return self.fill()

    def relieve(self):
        """Return those who may go instead of some that stand still. It must be called again and again."""
        if not self.line and self.limit == self.least:
            return []
        now = time.monotonic()
        with self.lock:
            late = [who for who, start in self.begun.items() if now - start > self.seconds][:len(self.line)]
            for who in late:
                del self.begun[who]
            if late:
                self.late, self.limit = now, min(2 * self.limit, max(MOST, self.least))
            elif now - self.late > STUCK:
                self.limit = self.least
            return self.fill()


def make_turns():
    """The Turns for each kind of work."""
    seconds = {BLOCKS: TICK, LISTS: STUCK / 2}          # sooner: one disk that hangs must not hold up who asks of another
    return {kind: Turns(limit, seconds.get(kind, STUCK)) for kind, limit in AT_ONCE.items()}


class FtpHandler(socketserver.BaseRequestHandler):
    """The communication loop: drives one session in the thread that socketserver made for it."""

    def handle(self):
        service = self.server.service
        session = service.welcome(self.request, self.client_address)
        self.gate = threading.Lock()        # stays locked; where this thread waits for its turn, another one opens it
        self.gate.acquire()
        try:
            with contextlib.closing(session.run()) as steps:
                wait = steps.send(None)
                while True:
                    if wait in AT_ONCE:
                        wait = self.in_turn(steps, wait)
                    elif wait_for(*wait[:3]):
                        service.asking.add(session)         # while it is in line, too
                        wait = wait[3] or RUNS
                    else:
                        wait = steps.throw(socket.timeout())
        except StopIteration:
            pass
        finally:
            service.farewell(session)

    def in_turn(self, steps, kind):
        """Let the session go on when it is its turn: to its next wait, or as long as nobody else is in line."""
        turns = self.server.turns[kind]
        if not turns.take(self.gate):
            self.gate.acquire()
        try:
            wait = steps.send(None)
            while wait == kind and turns.keep(self.gate):
                wait = steps.send(None)
            return wait
        finally:
            for gate in turns.end(self.gate):
                gate.release()


class Stopped(Exception):
    """Raised in the link loop to leave it."""


class Stoppable:
    """What both servers of this mode add to the link loop: it ends when the service stops."""
    daemon_threads = True

    def server_bind(self):
        tune_listener(self.socket, self.server_address[0])
        super().server_bind()

    def service_actions(self):
        if self.service.stopping:
            raise Stopped

    def serve_forever(self, poll_interval=TICK):
        with contextlib.suppress(Stopped):
            super().serve_forever(poll_interval)
        self.server_close()

    def process_request(self, request, client_address):
        try:
            super().process_request(request, client_address)
        except RuntimeError as error:
            LOG.error("no thread for %s: %s", address_text(client_address), error)
            if self.socket_type == socket.SOCK_STREAM:      # a datagram just gets no answer
                turn_away(request)

    def handle_error(self, request, client_address):
        LOG.exception("%s bug", address_text(client_address))


class ThreadFtpServer(Stoppable, socketserver.ThreadingTCPServer):
    """The link loop: accepts connections and starts a thread with a handler for each."""
    request_queue_size = BACKLOG

    def __init__(self, service, family, address):
        self.service, self.address_family = service, family
        self.turns = make_turns()
        threading.stack_size(256 << 10)                     # bytes for each thread, instead of the system's 8 MiB or so
        super().__init__(address, FtpHandler)

    def service_actions(self):
        super().service_actions()
        self.relieve()

    def relieve(self):
        """Let others go instead of threads that stand still."""
        for turns in self.turns.values():
            for gate in turns.relieve():
                gate.release()

    def get_request(self):
        taken = self.service.accept(self.socket)
        if taken is None:
            raise OSError("no connection")                  # socketserver goes on with the next
        return taken

    def start_discovery(self):
        """Answer on the UDP port of the same number too, from a link loop of its own."""
        discovery = DiscoveryServer(self.service, self.address_family, self.server_address)
        threading.Thread(target=discovery.serve_forever, daemon=True).start()

    def stop(self):
        """End all sessions; False where threads are left."""
        give_up = time.monotonic() + STOP_TIME
        all_end = self.service.cut_all(give_up)
        with self.service.left:
            while self.service.sessions and time.monotonic() < give_up:
                self.relieve()
                self.service.left.wait(TICK)
            return all_end and not self.service.sessions


class DiscoveryHandler(socketserver.BaseRequestHandler):
    """Over UDP there is no connection: self.request is the pair of a datagram and the server's socket."""

    def handle(self):
        data, sock = self.request
        self.server.discovery.answer(data, sock, self.client_address)


class DiscoveryServer(Stoppable, socketserver.ThreadingUDPServer):
    """The link loop over UDP: receives datagrams and starts a thread with a handler for each."""

    def __init__(self, service, family, address):
        self.service, self.address_family = service, family
        self.discovery = Discovery(service, address[1])
        super().__init__(address, DiscoveryHandler)


# ==== Backend: selectors, all clients in one loop =========================================================

def pop_each(items):
    """Take items from the left of a deque as long as there are any; more than one thread may."""
    with contextlib.suppress(IndexError):
        while True:
            yield items.popleft()


class Workers:
    """Threads for what would block the loop: as many as are busy at once."""

    def __init__(self):
        self.begun = False          # whether there is a thread
        self.idle = 0               # threads that wait for a job, less the jobs that wait for a thread
        self.lock = threading.Lock()
        self.jobs = QUEUE()

    def submit(self, function, argument):
        self.jobs.put((function, argument))
        with self.lock:
            self.idle -= 1
            if self.idle >= 0:
                return
        try:
            threading.Thread(target=self.work, daemon=True).start()
            self.begun = True
        except RuntimeError as error:
            LOG.error("no new thread: %s", error)
            if not self.begun:      # else those there are will do it
                self.do_job()       # in this one: slow, but not at an end

    def do_job(self):
        with self.lock:
            self.idle += 1
        function, argument = self.jobs.get()
        function(argument)

    def work(self):
        while True:
            self.do_job()


class Task:
    """A session in the loop: its coroutine, and what that waits for."""
    __slots__ = ("session", "steps", "sock", "event", "kind", "away", "deadline", "alarm")

    def __init__(self, session, sock):
        self.session, self.steps, self.sock = session, session.run(), sock
        self.event = 0              # what sock is registered for; 0: it is not
        self.kind = None            # kind of the work that comes when sock is ready
        self.away = None            # kind of the work that a worker does for it
        self.deadline = math.inf    # time.monotonic() at which the wait is over in any case
        self.alarm = math.inf       # when the loop looks at that, at the latest

    def advance(self, error=None):
        """Run the session to its next wait and return that, or "done"."""
        try:
            return self.steps.throw(error) if error else self.steps.send(None)
        except StopIteration:
            return "done"
        except Exception:           # a bug ends its own session only
            LOG.exception("%s bug", self.session.peer)
            return "done"


class SelectFtpServer:
    """One loop that waits for all sockets at once and lets the session of each that is ready go on."""

    def __init__(self, service, family, address):
        self.service = service
        self.dic = {}               # connection: its Task
        self.sel = selectors.DefaultSelector()
        self.workers = Workers()
        self.turns = make_turns()
        self.back = collections.deque()             # (Task, its next wait) from the workers
        self.alarms, self.tickets = [], itertools.count()       # heap of (time, ticket, Task); tickets break ties
        self.batch = collections.deque()            # of this turn's Tasks those that have to do with files
        self.slow_until = 0.0                       # time.monotonic() from which on the disk may be quick again
        self.create_socket(family, address)

    def create_socket(self, family, address):
        self.socket = self.add_socket(family, socket.SOCK_STREAM, address, self.accept)
        self.server_address = self.socket.getsockname()
        self.socket.listen(BACKLOG)
        self.bell, self.button = socket.socketpair()        # a worker's way to wake the loop: the self-pipe trick
        with contextlib.suppress(OSError):
            tune(self.button, "")                   # on Windows it is a connection over TCP
        self.rung = False                           # whether a byte is on its way from button to bell
        self.sel.register(self.bell, READ, self.answer_bell)

    def start_discovery(self):
        """Answer on the UDP port of the same number too: one more socket in the same loop."""
        self.discovery = Discovery(self.service, self.server_address[1])
        self.add_socket(self.socket.family, socket.SOCK_DGRAM, self.server_address, self.discover)

    def discover(self, sock, mask):
        """Callback of the discovery socket."""
        with contextlib.suppress(OSError):      # nothing there after all
            data, address = sock.recvfrom(socketserver.UDPServer.max_packet_size)
            self.discovery.answer(data, sock, address)

    def add_socket(self, family, kind, address, callback):
        """Bind a socket and wait for what arrives at it."""
        sock = socket.socket(family, kind)
        try:
            tune_listener(sock, address[0])
            sock.bind(address)
        except OSError:
            sock.close()
            raise
        self.sel.register(sock, READ, callback)
        return sock

    def serve_forever(self):
        while not self.service.stopping:
            self.turn()

    def turn(self):
        """Wait for events and call the callback of each."""
        patience = self.alarms[0][0] - time.monotonic() if self.alarms else TICK
        events = self.sel.select(min(TICK, max(0, patience)))
        for key, mask in events:
            callback = key.data
            try:
                callback(key.fileobj, mask)
            except Exception:       # one event less, and the loop goes on
                LOG.exception("bug in %s", callback.__name__)
        self.expire()
        self.do_batch()
        for turns in self.turns.values():
            for task in turns.relieve():
                self.workers.submit(self.work, task)

    def accept(self, sock, mask):
        """Callback of the listening socket."""
        for _ in range(ACCEPTS):
            taken = self.service.accept(sock)
            if not taken:
                break
            conn, address = taken
            self.dic[conn] = task = Task(self.service.welcome(conn, address), conn)
            self.wait(task, task.advance())

    def resume(self, conn, mask):
        """Callback of a client's socket: its session goes on to its next wait."""
        task = self.dic.get(conn)
        if task is None:            # ended by what came before it in this turn
            return
        if task.away:               # not now: a worker has the session
            self.sel.unregister(conn)
            task.event = 0
        else:
            self.wait(task, task.kind or task.advance())

    def wait(self, task, wait):
        """Note what a session waits for: a worker of some kind, a socket, or nothing any more."""
        task.deadline = math.inf
        try:
            if wait == "done":
                self.close(task)
            elif wait == BLOCKS:
                task.away = wait
                self.batch.append(task)
            elif wait in AT_ONCE:
                self.hand_over(task, wait)
            else:
                self.wait_for_socket(task, *wait)
        except Exception:           # it can't be: the session ends, and nothing else
            LOG.exception("%s bug", task.session.peer)
            self.close(task)

    def wait_for_socket(self, task, sock, event, timeout, kind):
        """Register for one event, and only when it changes."""
        if not task.event:
            self.sel.register(sock, event, self.resume)
        elif task.event != event:
            self.sel.modify(sock, event, self.resume)
        task.event, task.kind = event, kind and BLOCKS      # sendfile(2) is as other work with a disk here
        task.deadline = time.monotonic() + timeout
        self.set_alarm(task)

    def hand_over(self, task, kind):
        """Let a worker run a session as soon as it is its turn."""
        task.away = kind
        if self.turns[kind].take(task):
            self.workers.submit(self.work, task)

    def work(self, task):
        """In a worker: run a session until it really has to wait or others are in line; then the next of those."""
        tasks = [task]
        while tasks:
            task = tasks.pop()
            turns = self.turns[task.away]
            wait = task.advance()
            while turns.keep(task) and self.goes_on(task.away, wait):
                wait = task.advance()
            tasks += turns.end(task)
            if wait in AT_ONCE:
                self.hand_over(task, wait)
            else:
                self.back.append((task, wait))
                self.ring()

    def do_batch(self):
        """Let one worker do what this turn's sessions have to do with files, and wait for it: threads that run at the
        same time as this one would only fight with it for the interpreter's lock (GIL). But if it isn't quick, as with a
        disk that hangs, the loop goes on, and for a while each session gets a worker of its own."""
        if not self.batch:
            return
        batch, self.batch = self.batch, collections.deque()
        if time.monotonic() >= self.slow_until:
            patience, over = min(TICK, QUICK * (len(batch) + 2)), threading.Event()
            self.workers.submit(self.work_through, (batch, over))
            if not over.wait(patience):
                self.slow_until = time.monotonic() + SLOW_TIME
                over.set()
            self.take_back()
        for task in pop_each(batch):
            self.hand_over(task, BLOCKS)

    def work_through(self, job):
        """In a worker: run each session of a batch until it waits for anything but a file, unless the wait is over."""
        batch, over = job
        for task in pop_each(batch):
            wait = task.advance()
            while wait == BLOCKS:
                wait = task.advance()
            self.back.append((task, wait))
            if over.is_set():       # the loop has gone on, and sees to the others itself
                return self.ring()
        over.set()

    def ring(self):
        """Wake the loop, to take back what a worker is done with."""
        if not self.rung:           # else it has still to look
            self.rung = True
            with contextlib.suppress(OSError):      # closed: the server has stopped
                self.button.send(b"!")

    def goes_on(self, kind, wait):
        """Tell whether a worker may go on with a session without the loop: there is more of the same to do, or its socket
        is ready, and it is alone among those that block or does what only a few may do at a time."""
        few = kind != BLOCKS or len(self.turns[kind].begun) == 1
        return wait == kind or few and isinstance(wait, tuple) and wait_for(wait[0], wait[1], 0)

    def answer_bell(self, sock, mask):
        """Callback of the bell."""
        sock.recv(1)
        self.rung = False           # before the look: whoever comes after it rings again
        self.take_back()

    def take_back(self):
        """Note what the sessions wait for that come back from the workers."""
        for task, wait in pop_each(self.back):
            task.away = None
            self.wait(task, wait)

    def set_alarm(self, task):
        """See to it that expire() looks at task when its deadline comes. An alarm that is early enough serves again."""
        if task.deadline < task.alarm:
            task.alarm = task.deadline
            heapq.heappush(self.alarms, (task.alarm, next(self.tickets), task))

    def expire(self):
        """Wake the sessions whose wait is over without their socket being ready."""
        now = time.monotonic()
        while self.alarms and self.alarms[0][0] <= now:
            alarm, _, task = heapq.heappop(self.alarms)
            if alarm == task.alarm:                         # else an earlier one has replaced it
                task.alarm = math.inf
                if task.deadline <= now:
                    self.wait(task, task.advance(socket.timeout()))
                else:
                    self.set_alarm(task)

    def close(self, task):
        """End a session, once: forget its connection and close both."""
        if self.dic.pop(task.sock, None):
            if task.event:
                self.sel.unregister(task.sock)
            task.sock.close()
            self.service.farewell(task.session)
        task.steps.close()
        task.steps = task.session = None    # an alarm may keep the task, but not all that it holds
        if len(self.alarms) > 2 * len(self.dic) + 1000:
            self.alarms = [alarm for alarm in self.alarms if alarm[-1].session]
            heapq.heapify(self.alarms)

    def stop(self):
        """End all sessions; False where some didn't end in time."""
        self.sel.unregister(self.socket)
        self.socket.close()
        give_up = time.monotonic() + STOP_TIME
        self.service.cut_all(give_up)
        while self.service.sessions or any(task.away for task in self.dic.values()):
            if time.monotonic() > give_up:
                return False
            self.turn()
        for task in list(self.dic.values()):        # those that wait for a request
            self.close(task)
        for sock in [key.fileobj for key in self.sel.get_map().values()] + [self.button]:
            sock.close()
        self.sel.close()
        return True


MODES = {"selectors": SelectFtpServer, "socketserver": ThreadFtpServer}


# ==== Explain: what the running program does inside =======================================================

class Explainer:
    """Prints a line for each step of the loops, told by the interpreter's own profile hook: which methods run, in
    what order and in which class Python finds them is seen, not written here."""
    NOTES = {                       # for what has no docstring
        "get_request": "accepts: the new socket and the client's address",
        "UDPServer.get_request": "receives: the pair of a datagram and the server's socket, and the client's address",
        "handle": "talks with the client until one has enough", "setup": "what a handler does first",
        "finish": "what a handler does last", "select": "waits until a socket is ready",
        "register": "a socket to wait for, and what to call then", "modify": "another event to wait for on a socket",
        "unregister": "a socket not to wait for any more", "service_actions": "called every round; shown once",
        "BaseRequestHandler.__init__": "keeps request, client_address and server; calls setup, handle, finish",
    }

    def __init__(self, kind):
        self.kind = kind            # class of the server that is explained
        self.callbacks = set()      # code of the functions registered with a selector
        self.recent = collections.deque(maxlen=6)
        self.seen = set()           # what is shown once: (class, method)
        self.skipped = 0

    def install(self):
        """Print the lookup order, then tell what happens from now on."""
        if issubclass(self.kind, socketserver.BaseServer):
            for kind in (self.kind, DiscoveryServer):
                self.show("lookup order: " + " -> ".join(found.__name__ for found in kind.__mro__))
        threading.setprofile(self.hook)
        sys.setprofile(self.hook)

    def hook(self, frame, event, result):
        """Called by the interpreter whenever a function is entered or left."""
        if event not in ("call", "return") or frame.f_code.co_varnames[:1] != ("self",):
            return
        target = frame.f_locals.get("self")
        if issubclass(self.kind, socketserver.BaseServer):
            if event == "call" and isinstance(target, (socketserver.BaseServer, socketserver.BaseRequestHandler)):
                self.socketserver_call(target, frame)
        elif isinstance(target, selectors.BaseSelector):
            self.selector_call(target, frame, event, result)
        elif event == "call" and frame.f_code in self.callbacks:
            self.show_step("callback", target, frame, type(target).__name__)

    def socketserver_call(self, target, frame):
        name, kinds = frame.f_code.co_name, type(target).__mro__
        if not any(name in vars(kind) for kind in kinds if kind.__module__ == "socketserver"):
            return                  # a method that socketserver knows nothing of
        if (kinds[0], name) not in self.seen:
            self.show_step("communication loop" if self.talks(frame) else "link loop", target, frame, kinds[0].__name__)
        if name in ("service_actions", "fileno"):
            self.seen.add((kinds[0], name))

    @staticmethod
    def talks(frame):
        """Tell whether a call is part of the communication loop: as in the article, that is all from finish_request() in."""
        while frame and frame.f_code.co_name != "finish_request":
            frame = frame.f_back
        return frame is not None

    def selector_call(self, target, frame, event, result):
        name = frame.f_code.co_name
        if name not in ("register", "unregister", "modify", "select") or frame.f_back.f_code.co_name == name:
            return                  # another method, or one that its own override calls by super()
        if event == "call" and name != "select":
            callback = frame.f_locals.get("data")
            self.callbacks.add(getattr(getattr(callback, "__func__", None), "__code__", None))
            more = getattr(callback, "__name__", "fd %s" % frame.f_locals.get("fileobj"))
            self.show_step("event loop", target, frame, more, repeat=False)
        elif event == "return" and name == "select" and result:
            self.show_step("event loop", target, frame, "%d ready" % len(result), repeat=False)

    def show_step(self, loop, target, frame, more, repeat=True):
        name, kinds = frame.f_code.co_name, type(target).__mro__
        found = [kind for kind in kinds if name in vars(kind)]
        here = next((kind for kind in found if getattr(vars(kind)[name], "__code__", None) is frame.f_code), kinds[0])
        texts = [vars(kind)[name].__doc__ for kind in found[found.index(here):]] + [""]
        purpose = self.NOTES.get("%s.%s" % (here.__name__, name)) or self.NOTES.get(name) or \
            next(text for text in texts if text is not None).strip().split("\n")[0]
        if name == "handle":
            purpose += "; self.request is %s" % re.sub(r" {3,}|\\0+", " … ", repr(target.request))
        self.show("%-18s  %s.%s [%s]: %s" % (loop, here.__name__, name, more, purpose), repeat)

    def show(self, line, repeat=True):
        """Print a line; of those that an event loop repeats, only how many."""
        if not repeat and line in self.recent:
            self.skipped += 1
            return
        if self.skipped:
            say("explain: … the same again: %d more" % self.skipped, sys.stderr)
            self.skipped = 0
        self.recent.append(line)
        say("explain: " + line, sys.stderr)


# ==== Command line ========================================================================================

def printable(text):
    """The text with all that could command a terminal escaped."""
    return text if text.isprintable() else "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


class OneLine(logging.Formatter):
    """An event, a line; nothing that a peer has sent reaches the terminal raw."""

    def format(self, record):
        return printable(super().format(record))


def say(text, stream=None):
    """Print a line, also where the terminal's encoding lacks its characters."""
    stream = stream or sys.stdout
    if stream is None:              # no terminal at all
        return
    encoding = stream.encoding or "ascii"
    with contextlib.suppress(OSError, ValueError):          # a closed one must not end transfers
        stream.write(printable(text).encode(encoding, "backslashreplace").decode(encoding) + "\n")  # one write: threads
        stream.flush()


def size(text):
    """A number of bytes, as 500, 64K, 10M or 2G."""
    match = re.fullmatch("([0-9]{1,12})([KMGT]?)", text.upper())
    if not match:
        raise argparse.ArgumentTypeError("%r is not a size like 500, 64K, 10M or 2G" % text)
    return int(match.group(1)) << 10 * " KMGT".index(match.group(2) or " ")


def seconds(text):
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1e6:
        raise argparse.ArgumentTypeError("%r is not a number of seconds above 0" % text)
    return value


def port(text):
    if not re.fullmatch("[0-9]{1,5}", text) or int(text) > 65535:
        raise argparse.ArgumentTypeError("%r is not a port from 0 to 65535" % text)
    return int(text)


def count(text):
    if not re.fullmatch("[0-9]{1,9}", text) or not int(text):
        raise argparse.ArgumentTypeError("%r is not a number above 0" % text)
    return int(text)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="ftp_server.py", description="Store what clients put, serve what they get.")
    add = parser.add_argument
    add("host", nargs="?", default="127.0.0.1", metavar="HOST", help="address to listen on; 0.0.0.0: all (default: %(default)s)")
    add("port", nargs="?", default=PORT, type=port, metavar="PORT", help="0 for any that is free (default: %(default)s)")
    add("--mode", choices=sorted(MODES), default="selectors", help="one event loop, or a thread for each client (default: %(default)s)")
    add("--root", metavar="DIR", help="folder that holds upload/ and download/ (default: the folder of this script)")
    add("--upload", metavar="DIR", help="where put stores (default: upload in the root)")
    add("--download", metavar="DIR", help="what get and ls serve (default: download in the root)")
    add("--overwrite", action="store_true", help="an upload replaces a file of its name (default: both are kept)")
    add("--max-clients", type=count, metavar="N", default=10000, help="at once; one more is told busy (default: %(default)s)")
    add("--max-size", type=size, metavar="SIZE", help="largest upload: 500, 64K, 10M, 2G")
    add("--timeout", type=seconds, metavar="SECONDS", default=60, help="until an idle client is dropped (default: %(default)s)")
    add("--no-fsync", action="store_true", help="don't wait for the disk: faster, and a power cut may take what was stored")
    add("--no-discovery", action="store_true", help="don't answer ftp_client.py --find")
    add("--explain", action="store_true", help="show what the server does inside, as it happens")
    add("--log-file", metavar="FILE", help="write the log there too")
    add("-v", "--verbose", action="store_true", help="log listings too")
    add("-q", "--quiet", action="store_true", help="log problems only")
    add("--version", action="version", version="ftp_server.py " + VERSION)
    options = parser.parse_args(argv)
    both = re.fullmatch(r"([^:]+|\[.+\]):([0-9]+)", options.host)
    if both:
        parser.error("HOST and PORT are two words: %s %s" % both.groups())
    if re.fullmatch("[0-9]+", options.host):
        parser.error("HOST comes before PORT: 127.0.0.1 %s" % options.host)
    options.host = options.host.strip("[]")         # an IPv6 address as the banner prints it
    return options


class Unusable(SystemExit):
    """What the command line names can't be used: one line on stderr, and exit code 1."""

    def __init__(self, text):
        super().__init__(printable("ftp_server.py: " + text))


def find_folder(given, root, name):
    """The folder that an option names, which must exist, or the one in the root, which is made."""
    path = os.path.abspath(given or os.path.join(root, name))
    try:
        if not given:
            os.makedirs(path, exist_ok=True)
        os.listdir(path)
    except OSError as error:
        raise Unusable("can't use the folder %s: %s" % (path, error.strerror))
    return path


def open_server(options):
    """The server that the options ask for, bound to its port. Raises Unusable."""
    root = find_folder(options.root or os.path.dirname(os.path.abspath(__file__)), "", "")
    storage = Storage(find_folder(options.upload, root, "upload"), find_folder(options.download, root, "download"),
                      options.overwrite, not options.no_fsync, options.max_size)
    try:
        storage.sweep()
    except (OSError, Refusal) as error:
        raise Unusable("can't store in %s: %s" % (storage.upload, getattr(error, "strerror", error)))
    service = Service(options.mode, storage, options.timeout, options.max_clients)
    try:
        family, _, _, _, address = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM,
                                                      flags=socket.AI_PASSIVE)[0]
        return MODES[options.mode](service, family, address)
    except (OSError, UnicodeError) as error:
        hints = {errno.EADDRINUSE: "is another server running? Name another port, or 0 for any that is free",
                 errno.EADDRNOTAVAIL: "HOST must be an address of this machine; 0.0.0.0 stands for all that it has",
                 errno.EACCES: "ports below 1024 need more rights, others may be the system's own: name another one"}
        raise Unusable("can't listen on %s port %d: %s (%s)" % (
            options.host, options.port, getattr(error, "strerror", None) or error,
            hints.get(getattr(error, "errno", 0), "check HOST and PORT")))


def raise_descriptor_limit():
    """Allow as many open files and sockets as the system lets us."""
    if resource:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        for limit in (max(soft, 10240), hard):              # macOS says unlimited of hard, and takes no more than the former
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def set_up_log(options):
    handlers = [logging.StreamHandler()]
    if options.log_file:
        try:
            handlers.append(logging.FileHandler(options.log_file, encoding="utf-8"))
        except OSError as error:
            raise Unusable("can't write the log to %s: %s" % (options.log_file, error.strerror))
    for handler in handlers:
        handler.setFormatter(OneLine("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S"))
        LOG.addHandler(handler)
    LOG.setLevel(logging.DEBUG if options.verbose else logging.WARNING if options.quiet else logging.INFO)
    logging.logThreads = logging.logProcesses = False
    logging._srcfile = None                                 # the manual's way to save the search for the caller
    logging.raiseExceptions = False                         # a closed terminal must not end transfers


def own_addresses(family):
    """This machine's addresses, as others may see them."""
    found = []

    def look_up():
        with contextlib.suppress(OSError, UnicodeError):
            found.extend(info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM))

    with contextlib.suppress(RuntimeError):             # in a thread of its own: a name server may be silent for long
        thread = threading.Thread(target=look_up, daemon=True)
        thread.start()
        thread.join(LOOK_UP_TIME)
    for kind, anywhere in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with contextlib.suppress(OSError), socket.socket(kind, socket.SOCK_DGRAM) as probe:
            probe.connect((anywhere, 9))                    # sends nothing: it only picks the way out
            found.append(probe.getsockname()[0])
    usable = [address for address in found if not address.startswith(("127.", "::1", "fe80"))
              and (family == socket.AF_INET6 or ":" not in address)]
    return list(dict.fromkeys(usable)) or ["127.0.0.1"]


def print_banner(server):
    """Tell on stdout where the server listens, what it serves and what to type on the other machine."""
    host, port_number = server.server_address[:2]
    storage = server.service.storage
    say("listening on %s (%s)" % (address_text(server.server_address), server.service.mode))
    say("  put stores into   %s" % storage.upload)
    say("  get serves from   %s" % storage.download)
    for address in own_addresses(server.socket.family) if host in ("0.0.0.0", "::") else [host]:
        machine = "this" if is_loopback(address) else "the other"
        say("  on %s machine:  python ftp_client.py %s %d" % (machine, address, port_number))
    if not is_loopback(host):
        say("  whoever reaches this port can read the second folder and add to the first: no password, no encryption")


def on_signals(handler):
    """Let a handler see to whatever asks us to stop."""
    for name in ("SIGINT", "SIGTERM", "SIGBREAK"):      # the last is Windows'
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), handler)


def main(argv=None):
    options = parse_args(argv)
    set_up_log(options)
    raise_descriptor_limit()
    if options.explain:
        Explainer(MODES[options.mode]).install()
    server = open_server(options)

    def stop(signal_number, frame):
        server.service.stopping = True
    on_signals(stop)
    if not options.no_discovery:
        try:
            server.start_discovery()
        except (OSError, RuntimeError) as error:
            LOG.warning("no discovery on UDP port %d: %s", server.server_address[1], error)
    print_banner(server)
    server.serve_forever()
    stopped = server.stop()
    on_signals(signal.SIG_IGN)      # a second one would kill us at the very end
    if not stopped:                 # a thread waits for a client, or hangs on a disk: leave without it
        if server.service.sessions:
            LOG.warning("stopped; what was under way goes on as partial files")
        os._exit(0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
