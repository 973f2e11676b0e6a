#!/usr/bin/env python3
"""Move files to and from an ftp_server.py, one after another or whole folders.

    python ftp_client.py HOST PORT                    the >>> prompt; help tells its commands
    python ftp_client.py HOST PORT put a.txt *.pdf    one command, then the exit code says how it went
    python ftp_client.py HOST PORT get -r handouts    a folder with all that is in it

A file is sent or fetched under a partial name, hashed end to end (SHA-256), flushed to disk and only then
given its name; what breaks goes on where it broke, after a check that what is there already is the same.

Reading order: messages (what both scripts agree on), the link (one connection), local files, the jobs
(one file each, a put or a get), the client (many jobs over one connection that may break), progress bar,
prompt, command line. All sockets here simply block, with a time limit: compare the server.
"""
import argparse
import collections
import contextlib
import errno
import fnmatch
import getopt
import glob
import hashlib
import io
import itertools
import json
import math
import os
import re
import select
import socket
import stat
import sys
import time

try:
    import fcntl
    import termios
except ImportError:  # Windows
    fcntl = termios = None
    import msvcrt

VERSION = "1.0"
PORT = 8885                # the original's
LOOPBACK_BUFFER = 1 << 19  # bytes of a socket's buffers on loopback: what is on its way stays in the processor's cache
CHUNK = 1 << 18            # bytes read from a file or a socket at a time; what is sent is joined up to so many
RECEIVE = 1 << 20          # bytes taken off the socket at a time
SLICE = 1 << 22            # bytes that one sendfile(2) may take
SMALL = 1 << 18            # bytes up to which a file is sent at once, without asking what is there of it
TINY = 1 << 14             # bytes up to which it is sent so after a break too
WINDOW = 256               # requests sent before the first is answered, at most
NAMES = 8192               # characters of the names in them, about: answers repeat names, and both sides full is a deadlock
HEADER_TIME = 10           # seconds from a header's first byte to its last
WORK_RATE = 5e6            # bytes a second that a server hashes, or the original one reads, at least
FIRST_PAUSE, LAST_PAUSE = 0.5, 30      # seconds between two tries to take up a broken connection
QUIET_TIME = 0.02          # seconds without a further byte that end a classic answer
PARTIAL = ".partial"       # folder on the server, and the end of the hidden file beside what is being fetched
UNFINISHED = re.compile(r"\..*\.[0-9a-f]{16}" + re.escape(PARTIAL), re.DOTALL)      # all of that file's name, see Target
OF_FOLDER = errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT      # errors that are its folder's, not that file's
WILD = re.compile(r"[*?\[]")     # what makes a name a pattern
BIDI = re.compile("[\u202a-\u202e\u2066-\u2069]")     # what turns around how a terminal shows what follows
FRESH = 0.05               # seconds after a write in which the next one may get the same stamps
SETTLED = 2                # the same on a disk whose stamps are coarse
NAME_LIMIT = 255           # bytes of one part of a name
PATH_LIMIT = 4096          # bytes of a whole name
LISTING_LIMIT = 1 << 28    # bytes of a listing that we take into memory
FIND_TIME = 1              # seconds to wait for servers to answer
FIND_SIZE = 512            # bytes of a discovery request: answers are never longer
READ, WRITE = 1, 2         # what to wait for: one of them, or both (READ | WRITE)
HAS_POLL = hasattr(select, "poll")      # Windows has select() only
BAR_TIME = 0.1             # seconds between two drawings of the progress bar, at least


# ==== Errors ==========================================================================================

class Failed(Exception):
    """One file can't be sent, fetched or stored; str() says why. The next may go well."""


class Refusal(Failed):
    """The server, or a check before it, says no."""

    def __init__(self, code, text):
        super().__init__(text)
        self.code = code


class BadMessage(Failed):
    """What arrived is not a message, or a field of it is not what it must be."""


class Broken(Exception):
    """The connection broke, or the other side is silent: it may be taken up again."""


class Busy(Broken):
    """The server can't just now."""


class HungUp(Broken):
    """The other side closed the connection."""


class Unreachable(Exception):
    """There is no connection to be had; str() says what to check."""


def reason(error):
    """What went wrong, in words: of an OSError with the file's name, the new one where it is about two."""
    if isinstance(error, BadMessage):
        return "the server talks nonsense: %s" % error
    if isinstance(error, RecursionError):               # of os.makedirs() and, before Python 3.12, os.walk()
        return "too many folders inside one another"
    name = getattr(error, "filename2", None) or getattr(error, "filename", None)
    if isinstance(name, str) and UNFINISHED.fullmatch(os.path.basename(name)) and error.errno in OF_FOLDER:
        name = os.path.dirname(name) or "this folder"   # which is what can be mended
    return "%s%s" % (name + ": " if isinstance(name, str) else "", getattr(error, "strerror", None) or error)


# ==== Names: the same rules as the server's ===========================================================

UNSAFE = re.compile("[\0-\x1f\x7f-\x9f\ud800-\udfff\\\\]")       # C0, DEL, C1, lone surrogates, backslash
WINDOWS_UNSAFE = re.compile(r'[<>:"|?*]|[. ]$')
WINDOWS_DEVICE = re.compile(r"^(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³]|conin\$|conout\$)(?= *(?:$|\.))", re.IGNORECASE)


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


# ==== Link: one connection ==============================================================================

class Link:
    """A connected socket that blocks, but no wait takes longer than timeout seconds. Raises Broken."""

    def __init__(self, sock, timeout, show):
        with contextlib.suppress(OSError):      # reset already: the first use will tell
            tune(sock, sock.getpeername()[0])
        sock.settimeout(timeout)
        self.sock, self.timeout, self.show = sock, timeout, show
        self.ahead = bytearray()    # read, not used yet
        self.owed = bytearray()     # not sent yet
        self.deadline = math.inf    # time.monotonic() at which a wait ends even if bytes still come, as for a header
        self.buffer = None          # of read(), made when it is first needed

    def call(self, operation, *args):
        """Do an operation of the socket's; Broken for whatever it raises."""
        try:
            return operation(*args)
        except socket.timeout:
            raise Broken("nothing moved for %g seconds" % self.timeout) from None
        except ConnectionError as error:
            raise HungUp(error.strerror) from None
        except OSError as error:
            raise Broken(error.strerror or str(error)) from None

    def send(self, data):
        """Send at most CHUNK bytes, later: small requests travel together."""
        if len(self.owed) + len(data) > CHUNK:
            self.flush()
        self.owed += data

    def flush(self):
        """Send all that is owed."""
        while self.owed:
            del self.owed[:self.push(self.sock.send, self.owed)]

    def push(self, operation, *args):
        """Do a sending operation when the socket takes some bytes; how many it took."""
        self.wait(WRITE, self.timeout)
        return self.call(operation, *args)

    def pull(self, operation, *args):
        """Do a receiving operation; what it got. Raises HungUp at the end of the stream."""
        got = self.call(operation, *args)
        if not got:
            raise HungUp("the server closed the connection")
        return got

    def wait(self, event, seconds):
        """Wait until the socket is ready. A peer that still takes what is on its way to it is slow but not silent.

        What arrives before it is ready to send is read: the server may wait for that, or have hung up."""
        left, now = unsent(self.sock), time.monotonic()
        limit = now + seconds
        while True:
            events = event | READ if len(self.ahead) < CHUNK else event
            ready = wait_for(self.sock, events, max(0, min(seconds / 8, limit - now, self.deadline - now)))
            if ready & event:
                return
            if ready:
                self.ahead += self.pull(self.sock.recv, CHUNK)
            left, before, now = unsent(self.sock), left, time.monotonic()
            if left < before:
                limit = now + seconds
            if now >= limit:
                raise Broken("nothing moved for %.3g seconds" % seconds)
            if now >= self.deadline:
                raise Broken("a header was not complete in %g seconds" % HEADER_TIME)

    def request(self, **message):
        line = encode(message)
        self.show("->", line)
        self.send(line)

    def fill(self, patience=0):
        """Read more of the stream ahead, after all that is owed was sent: within timeout + patience seconds."""
        try:
            self.flush()
        except Broken:
            if not self.answered():     # what came before it broke counts
                raise
        self.wait(READ, self.timeout + patience)
        self.ahead += self.pull(self.sock.recv, CHUNK)

    def read_line(self, patience=0):
        """Read one header: its first byte within timeout + patience seconds, the rest within HEADER_TIME."""
        if not self.ahead:
            self.fill(patience)
        self.deadline = time.monotonic() + HEADER_TIME
        try:
            while True:
                end = self.ahead.find(b"\n", 0, HEADER_LIMIT) + 1
                if end:
                    return self.take(end)
                if len(self.ahead) >= HEADER_LIMIT:
                    raise BadMessage("a header is longer than %d bytes" % HEADER_LIMIT)
                self.fill()
        finally:
            self.deadline = math.inf

    def take(self, count):
        """Take count bytes, or as many as there are, of what was read ahead."""
        data = bytes(self.ahead[:count])
        del self.ahead[:count]
        return data

    def answer(self, patience=0):
        """Read one answer. Raises Refusal where the server says no."""
        line = self.read_line(patience)
        self.show("<-", line)
        message = decode(line)
        if message.get("ok") is True:
            return message
        code, text = message.get("code"), message.get("error")
        if message.get("ok") is not False or not isinstance(code, str) or not isinstance(text, str):
            raise BadMessage("neither an answer nor an error")
        if code in ("timeout", "busy"):     # may be better in a moment
            raise (Busy if code == "busy" else Broken)("%s (%s)" % (text, code))
        raise Refusal(code, "%s (%s)" % (text, code))

    def classic_request(self, *words):
        if any("|" in word for word in words):
            raise Failed("the classic dialect has no names with |")
        line = "|".join(words).encode("utf-8")
        self.show("->", line)
        self.send(line)

    def classic_answer(self, pattern, *openings):
        """Read an answer that has no end: it is over when nothing more comes for QUIET_TIME. The match. Raises Failed.

        What doesn't match the pattern yet is waited for while it begins one of the openings."""
        try:
            while (wait_for(self.sock, READ, QUIET_TIME) if re.fullmatch(pattern, bytes(self.ahead))
                   else any(opening.startswith(bytes(self.ahead)) for opening in openings)):
                self.fill()
                self.deadline = min(self.deadline, time.monotonic() + HEADER_TIME)
        except Broken as error:                 # what came before it broke counts
            if not self.ahead and isinstance(error, HungUp):
                raise Failed("the server hung up: it refuses that, or it is no ftp_server.py") from None
            if not self.ahead:
                raise
        finally:
            self.deadline = math.inf
        said = self.take(len(self.ahead))
        self.show("<-", said)
        match = re.fullmatch(pattern, said)
        if not match:
            raise Failed("the server answered nonsense")
        return match

    def read(self, limit):
        """Read at least one byte and at most limit; they are overwritten by the next read."""
        if self.ahead:
            return self.take(limit)
        self.buffer = self.buffer or memoryview(bytearray(RECEIVE))
        if not HAS_POLL:                    # Ctrl-C ends no recv() there
            self.wait(READ, self.timeout)
        return self.buffer[:self.pull(self.sock.recv_into, self.buffer[:limit])]

    def answered(self):
        """Tell whether the server has said something already, or has closed."""
        return bool(self.ahead or wait_for(self.sock, READ, 0))


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


# ==== Local files =======================================================================================

OPEN_FLAGS = sum(getattr(os, flag, 0) for flag in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY", "O_NOINHERIT"))
# What the system says of a call that the disk or the system lacks; the two in the middle differ on macOS.
UNSUPPORTED = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}
PARTIAL_FLAGS = os.O_RDWR | os.O_CREAT | OPEN_FLAGS | getattr(os, "O_NOFOLLOW", 0)


def unicode_name(name):
    """The Unicode form of a local name. Raises Failed where it has none."""
    try:
        return from_disk(name)
    except ValueError:
        raise Failed("%s is not a Unicode name" % name) from None


def open_source(path):
    """Open a regular file for reading; the raw file. Raises Failed."""
    try:
        file = io.FileIO(path, "rb", opener=lambda path, flags: os.open(path, flags | OPEN_FLAGS))
    except OSError as error:
        raise Failed("not a file (put -r sends folders)" if os.path.isdir(path) else error.strerror) from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise Failed("not a regular file")
    return file


def size_of(path):
    try:
        return os.path.getsize(path)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:           # nothing can ever be stored there
            raise
        return 0                                        # opening it will say what is wrong


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


def changed(file, before):
    """Tell whether somebody wrote to an open file since fstat(2) told before.

    Writing changes ctime; so does losing a name to a newer file, which leaves the content as it was. What else
    changes it, as a new owner does, counts as writing: nobody could tell."""
    now = os.fstat(file.fileno())
    if (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        return True
    return now.st_nlink >= before.st_nlink and now.st_ctime_ns != before.st_ctime_ns


def work_time(size):
    """Seconds that a server may take for size bytes before it says something."""
    return min(size / WORK_RATE, 1e6)           # poll(2) takes no more than 2e6


def pieces(file, start, stop):
    """Yield what a raw file holds from start to stop; each piece overwrites the last. Raises Failed if it is shorter."""
    view = memoryview(bytearray(min(stop - start, CHUNK)))
    file.seek(start)
    while start < stop:
        count = file.readinto(view[:stop - start])
        if not count:
            raise Failed("the file shrank while it was read: try again")
        yield view[:count]
        start += count


def hash_file(file, length):
    """SHA-256 of the first length bytes of a raw file, which is left behind them. Raises Failed if it is shorter."""
    digest = hashlib.sha256()
    for data in pieces(file, 0, length):
        digest.update(data)
    return digest


def write_all(file, view):
    done = 0
    while done < len(view):
        done += file.write(view[done:])


def same_content(one, other):
    """Tell whether two local files hold the same bytes."""
    try:
        with open_source(one) as first, open_source(other) as second:
            if os.fstat(first.fileno()).st_size != os.fstat(second.fileno()).st_size:
                return False
            return all(data == second.read(CHUNK) for data in iter(lambda: first.read(CHUNK), b"")) and not second.read(1)
    except Failed as error:
        if getattr(error.__cause__, "errno", None) in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO):
            raise                       # who knows?
        return False


def sync_folder(path):
    """Flush the names in a folder to disk; Windows can't and needn't."""
    if os.name != "nt":
        with contextlib.suppress(OSError):          # gone meanwhile: it was moved or removed on purpose
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


def nanoseconds(seconds):
    """A time as os.utime() takes it, so exact that a float read from one file comes out of the other the same."""
    whole, part = divmod(seconds, 1)
    return int(whole) * 10 ** 9 + round(part * 1e9)


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


def patiently(rename, *args, **where):
    """Call a function that renames a file; on Windows again, for a moment, where it may not: virus scanners open what is new."""
    for pause in (0.05, 0.1, 0.2, 0.4) if os.name == "nt" else ():
        with contextlib.suppress(PermissionError):
            return rename(*args, **where)
        time.sleep(pause)
    return rename(*args, **where)


class Target:
    """A file on its way in: a hidden partial file beside it, to which publish() gives the final name."""

    def __init__(self, path):
        self.path = path
        self.folder, name = os.path.split(path)
        name = unicode_name(name).encode("utf-8")
        end = ".%s%s" % (hashlib.sha256(name).hexdigest()[:16], PARTIAL)       # so that no user's file has this name
        name = to_disk(name[:NAME_LIMIT - len("." + end)].decode("utf-8", "ignore"))
        self.partial = os.path.join(self.folder, "." + name + end)
        self.file = None

    def open_partial(self):
        """Open the partial, made if there is none: (fd, whether it was there)."""
        try:
            return os.open(self.partial, PARTIAL_FLAGS | os.O_EXCL, 0o666), False
        except FileExistsError:
            return os.open(self.partial, PARTIAL_FLAGS, 0o666), True
        except FileNotFoundError:
            os.makedirs(self.folder or ".", exist_ok=True)
            return os.open(self.partial, PARTIAL_FLAGS, 0o666), True

    def open(self):
        """Open the partial and lock it against other clients; how long it is."""
        while self.file is None:
            fd, found = self.open_partial()
            file = io.FileIO(fd, "rb+")
            try:
                info = self.lock(fd)
                if found:
                    self.check_owner(info)
                named = os.name == "nt" or self.has_name(info)      # Windows keeps an open file's name
                if named and info.st_nlink < 2:
                    self.file = file
                    return info.st_size
                if named:                   # published, and killed before this name was taken away
                    if os.name == "nt":     # Windows doesn't remove an open file
                        file.close()
                    os.unlink(self.partial)
            finally:
                if not self.file:
                    file.close()
        return os.fstat(self.file.fileno()).st_size

    def lock(self, fd):
        """Lock the open partial; what fstat() says of it then. Raises Failed."""
        try:
            lock(fd)
        except (BlockingIOError, PermissionError):
            raise Failed("another client is fetching it here") from None
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise Failed("%s is in the way" % self.partial)
        return info

    def check_owner(self, info):
        """Raise Failed for another user's partial in a folder as /tmp: its owner could still write to it later."""
        if os.name != "nt" and info.st_uid != os.geteuid():
            there = os.stat(self.folder or ".")
            if there.st_mode & stat.S_ISVTX and info.st_uid != there.st_uid:
                raise Failed("%s is another user's" % self.partial)

    def has_name(self, info):
        """Tell whether the partial's name is still that of an open file: who had the lock may have removed or published it."""
        try:
            return os.path.samestat(os.lstat(self.partial), info)
        except FileNotFoundError:
            return False

    def close(self):
        """Let go of the partial; an empty one is removed."""
        if self.file:
            file, self.file = self.file, None
            with contextlib.suppress(OSError), contextlib.closing(file):
                if os.name == "nt":                     # Windows doesn't remove an open file
                    file.close()
                if not os.path.getsize(self.partial):
                    os.unlink(self.partial)

    def publish(self, mtime, replace):
        """Flush the partial to disk and give it its name: (path stored, whether the same content was there)."""
        fd = self.file.fileno()
        if os.name != "nt":
            self.stamp(fd if os.utime in os.supports_fd else self.partial, mtime)
        os.fsync(fd)
        if os.name != "nt" and not self.has_name(os.fstat(fd)):         # another file may have it now
            raise Failed("%s was removed meanwhile: try again" % self.partial)
        stored, duplicate = self.rename(replace)
        self.file.close()
        if os.name == "nt" and not duplicate:       # there an open file's flush and its end set its time anew
            self.stamp(stored, mtime)
        self.file = None
        return stored, duplicate

    @staticmethod
    def stamp(file, mtime):
        if mtime is not None:
            with contextlib.suppress(OSError, OverflowError):       # a time that this system can't hold
                os.utime(file, ns=(nanoseconds(mtime),) * 2)

    def unlock(self):
        """Make way for what Windows does with no open file; no sooner than it must be, as others may then open it."""
        if os.name == "nt":
            self.file.close()

    def rename(self, replace):
        if replace:
            self.unlock()
            patiently(os.replace, self.partial, self.path)
            return self.path, False
        for path in self.candidates():
            if self.link(path):
                return path, False
            self.unlock()
            if same_content(self.partial, path):
                with contextlib.suppress(OSError):      # as in link()
                    os.unlink(self.partial)
                return path, True

    def candidates(self):
        """Yield the path, then the numbered ones, those first that are taken: there may be gaps between them."""
        yield self.path
        name = from_disk(os.path.basename(self.path))
        start = to_disk(numbered_start(name))       # first: a folder may hold thousands of names
        taken = {found for found in os.listdir(self.folder or ".") if found.startswith(start)
                 and is_numbered(os.fsencode(found).decode("utf-8", "replace"), name)}
        for found in sorted(taken):
            yield os.path.join(self.folder, found)
        for number in itertools.count(2):
            if to_disk(numbered(name, number)) not in taken:
                yield os.path.join(self.folder, to_disk(numbered(name, number)))

    def link(self, path):
        """Move the partial to path, which never replaces what is there: then the value is False."""
        try:
            os.link(self.partial, path, follow_symlinks=os.link not in os.supports_follow_symlinks)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in UNSUPPORTED | {errno.EPERM}:
                raise
            if os.path.lexists(path):               # a disk without hard links (FAT)
                return False
            self.unlock()
            patiently(os.rename, self.partial, path)
            return True
        self.unlock()
        with contextlib.suppress(OSError):          # it is stored: the old name is taken away when it is needed again
            os.unlink(self.partial)
        return True


# ==== Jobs: one file each ===============================================================================

class Job:
    """One file to move. ask() sends the request, finish() takes the answer; several may be asked before the first
    is finished. Both are done again after the connection broke."""
    alone = False           # True: nothing else may be under way
    done = 0                # bytes that are across, what was there before among them
    furthest = 0            # offset from which it went on
    outcome = ""

    def __init__(self, client, name, size):
        self.client, self.name, self.size = client, name, size      # the name on the wire
        self.hashed = None, None    # what hash_once() has hashed last, and the digest

    def ask_first(self):
        """Note that the line is bad: what is there already is worth a question."""

    def drop(self):
        """Let go of what is open."""

    def read_past(self):
        """After a failure here: tell whether nothing of this file is left in the stream."""
        return True

    def hash_once(self, file, length):
        """The digest of the first length bytes, kept: a server may lose patience meanwhile, and the next try has it."""
        info = os.fstat(file.fileno())
        wanted = info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns, length
        if self.hashed[0] != wanted:
            self.hashed = wanted, hash_file(file, length)
        return self.hashed[1].copy()

    def progress(self, count):
        self.done += count
        self.client.bar.add(self, count)

    def resize(self, size):
        """Note the size, which was a guess before."""
        self.client.bar.size += size - self.size
        self.size = size

    def begin(self, direction, offset):
        """Note that the bytes come next, from the offset that both sides agreed on."""
        self.client.show(direction, b"%d bytes" % (self.size - offset))
        if offset > self.furthest:
            self.furthest, self.client.tries = offset, 0
        self.client.bar.add(self, offset - self.done, moved=False)
        self.done = offset


class Put(Job):
    """Send one local file."""
    fresh = False           # whether it was at one of the tries: what hash_once() keeps may be older than the last change

    def __init__(self, client, path, name):
        super().__init__(client, remote_name(name), size_of(path))
        self.path = path
        self.alone = self.size > SMALL

    def ask(self):
        with self.opened() as file:
            if self.alone:
                self.send_asking(file)
            else:
                self.send_at_once(file)

    def opened(self):
        """Open the file and note what it is before it is read."""
        file = open_source(self.path)
        self.before = os.fstat(file.fileno())
        self.fresh = self.fresh or fresh(self.before)
        self.resize(self.before.st_size)
        return file

    def check(self, file, digest, length):
        """Raise Failed if somebody wrote to the file since it was opened.

        A fresh one is read once more for that: digest is of its first length bytes, as they were read."""
        if self.fresh and self.hash_once(file, length).digest() != digest.digest() or changed(file, self.before):
            raise Failed("the file changed while it was read: try again")

    def ask_first(self):
        self.alone = self.size > TINY

    def header(self, **more):
        self.client.link.request(cmd="put", name=self.name, size=self.size, mtime=self.before.st_mtime,
                                 **more, **self.client.hashing)

    def send_at_once(self, file):
        data = file.read(min(self.size, SMALL) + 1)     # it may have grown far beyond that
        if len(data) != self.size:
            raise Failed("the file changed while it was read: try again")
        digest = hashlib.sha256(data)
        self.check(file, digest, self.size)
        self.header()
        self.begin("->", 0)
        self.client.link.send(data)
        self.last_line(digest)
        self.progress(len(data))

    def last_line(self, digest):
        self.sha256 = digest.hexdigest() if self.client.verify else None
        self.client.link.request(sha256=self.sha256)

    def send_asking(self, file):
        what = [socket.gethostname(), os.path.abspath(self.path), str(self.size), str(self.before.st_mtime_ns)]
        ident = hashlib.sha256("\0".join(what).encode("utf-8", "surrogateescape")).hexdigest()
        offset, digest = self.agree_on_offset(file, ident)
        self.header(offset=offset, id=ident)
        self.begin("->", offset)
        try:
            try:
                self.stream(file, offset, self.size, digest if self.client.verify or self.fresh else None)
            except Broken:
                self.listen()       # it may say why it takes no more
                raise
            self.check(file, digest, self.size)
        except BaseException:       # unfinished: what is sent next must not be taken for the rest of it
            self.client.close()
            raise
        self.last_line(digest)

    def agree_on_offset(self, file, ident):
        """Ask how much of the file the server has, and believe it only if the hash is ours: (offset, digest)."""
        link = self.client.link
        link.request(cmd="resume", name=self.name, size=self.size, id=ident)
        offset, sha256 = fields(link.answer(work_time(self.size)), "offset", "sha256")
        if 0 < offset <= self.size:
            digest = self.hash_once(file, offset)
            if digest.hexdigest() == (sha256 or "").lower():
                return offset, digest
        return 0, hashlib.sha256()

    def stream(self, file, offset, stop, digest):
        """Send the file from offset to stop; hash it on the way if there is a digest, else don't read it if that can be."""
        link = self.client.link
        link.flush()
        while offset < stop and not digest and hasattr(os, "sendfile"):
            self.listen()
            count = link.push(self.sendfile, file.fileno(), offset, min(SLICE, stop - offset))
            if count is None:
                break
            if not count:
                raise Failed("the file shrank while it was sent: try again")
            self.progress(count)
            offset += count
        for data in pieces(file, offset, stop):
            if digest:
                digest.update(data)
            self.listen()
            link.send(data)
            self.progress(len(data))

    def sendfile(self, fd, offset, count):
        """sendfile(2); None where the file's system can't do that. Raises Failed where the file can't be read."""
        try:
            return os.sendfile(self.client.link.sock.fileno(), fd, offset, count)
        except OSError as error:
            if error.errno == errno.EIO:
                raise Failed(error.strerror)
            if error.errno not in UNSUPPORTED:
                raise
            return None

    def listen(self):
        """An answer before the end is a refusal: read it rather than send what nobody wants."""
        if self.client.link.answered():
            self.answer()
            raise BadMessage("an answer before the end of the file")

    def answer(self):
        """Read the answer of a server that has let us begin."""
        try:
            return self.client.link.answer(work_time(self.size))
        except Busy as error:
            if not self.alone:
                raise
            self.client.close()         # as the server does. To come back would only throw out who came instead
            raise Failed(str(error)) from None

    def finish(self):
        answer = self.answer()
        stored, size, sha256, duplicate = fields(answer, "name", "size", "sha256", "duplicate")
        if size != self.size or (sha256 and sha256.lower()) != self.sha256:
            raise BadMessage("it stored something else than what was sent")
        self.outcome = "already there as %s" % stored if duplicate else "stored as %s" % stored

    def classic(self):
        """The same in the original's dialect: no offset, no hash, no answer at the end."""
        with self.opened() as file:
            link = self.client.link
            link.classic_request("put", self.name, str(self.size))
            link.classic_answer(rb"OK", b"OK")
            self.client.known = True
            self.begin("->", 0)
            last = max(0, self.size - 1)    # the last byte is held back until it is sure that all fit together
            digest = hashlib.sha256() if self.fresh else None
            try:
                self.stream(file, 0, last, digest)
                file.seek(last)
                end = file.read(self.size - last)
                self.check(file, digest, last)
                if end:
                    self.listen()
                    link.send(end)
                    self.progress(len(end))
                link.flush()
            except Broken as error:         # the original would append what is sent again
                raise Failed("%s; the server may have stored a part" % error)
            link.sock.shutdown(socket.SHUT_WR)
            # The original drops what it hasn't read of one connection when the next one asks; some close when done.
            wait_for(link.sock, READ, 0.5 + work_time(self.size))
        self.outcome = "sent (the classic dialect has no last answer)"


def remote_name(path):
    """The name on the wire for a relative local path. Raises Failed."""
    name = "/".join(unicode_name(part) for part in path.split(os.sep))
    split_name(name)
    return name


class MakeFolder(Job):
    """Make a folder on the server: an empty one, that no file would bring along."""

    def __init__(self, client, name):
        super().__init__(client, remote_name(name), 0)

    def ask(self):
        self.client.link.request(cmd="mkdir", name=self.name)

    def finish(self):
        self.client.link.answer()
        self.outcome = "folder is there"

    def classic(self):
        raise Failed("the classic dialect has no folders")


class Get(Job):
    """Fetch one remote file to a local path."""

    def __init__(self, client, name, path, size, replace):
        super().__init__(client, name, size)
        if UNFINISHED.fullmatch(os.path.basename(path)):
            raise Failed("a get that was never finished left it there")
        if replace and os.path.lexists(path) and not (os.path.isfile(path) or os.path.islink(path)):
            raise Failed("what has that name here is not a file")
        self.target, self.replace = Target(path), replace
        self.here = None            # (length, digest) of what is here already and was told to the server
        self.coming = None          # bytes still to come before the last line of the answer; None: no answer
        self.partial_size, self.path_size = size_of(self.target.partial), size_of(path)
        self.alone = self.partial_size > 0 or self.path_size > SMALL

    def ask(self):
        """Ask for what is missing: behind the partial, or behind the whole file if that is here already."""
        offset, digest, self.coming = 0, None, None
        if self.target.file or self.partial_size:
            offset = self.target.open()
            digest = self.hash_once(self.target.file, offset)
        elif self.path_size and not self.replace:
            with contextlib.suppress(Failed), open_source(self.target.path) as file:
                size = os.fstat(file.fileno()).st_size
                offset, digest = size, self.hash_once(file, size)
        self.here = offset, digest
        more = {"offset": offset, "sha256": digest.hexdigest()} if offset else {}
        self.client.link.request(cmd="get", name=self.name, **more, **self.client.hashing)

    def finish(self):
        link = self.client.link
        length, digest = self.here
        size, offset, mtime = fields(link.answer(work_time(length)), "size", "offset", "mtime")
        self.resize(size)
        if offset not in (0, length) or offset > self.size:
            raise BadMessage("an offset that was not asked for")
        if not offset:
            digest = hashlib.sha256()
        self.begin("<-", offset)
        self.coming = self.size - offset
        if offset and self.target.file is None:             # the file under its own name is what goes on
            if offset == self.size:
                self.check(digest)
                self.outcome = "already here"
                if os.path.lexists(self.target.partial):    # an empty one, which a killed get left: else it had been asked with
                    with contextlib.suppress(Failed, OSError):
                        self.target.open()
                    self.target.close()
                return
            self.copy_here(offset, digest)
        self.open_at(offset)
        self.check_room()
        self.receive(digest if self.client.verify else None)
        self.check(digest)
        self.store(mtime)

    def open_at(self, offset):
        """Make the partial ready for the byte at offset."""
        if self.target.open():
            self.target.file.truncate(offset)
            self.target.file.seek(offset)

    def copy_here(self, offset, digest):
        """Start the partial with what is here under the final name, which must still be what the digest is of."""
        self.open_at(0)
        with open_source(self.target.path) as source:
            for data in pieces(source, 0, offset):
                write_all(self.target.file, data)
        if hash_file(self.target.file, offset).digest() != digest.digest():
            raise Failed("the file here changed meanwhile: try again")

    def check_room(self):
        """Raise Failed where the disk can't take what is to come: a partial that fills it would make the next ones fail, too."""
        if self.coming > SMALL:
            import shutil
            disk = shutil.disk_usage(self.target.folder or ".")
            if disk.free < self.coming and disk.total:      # some network disks tell neither
                raise Failed("no room here for %d bytes" % self.size)

    def receive(self, digest):
        while self.coming:
            data = self.client.link.read(self.coming)
            self.coming -= len(data)
            write_all(self.target.file, data)
            if digest:
                digest.update(data)
            self.progress(len(data))

    def check(self, digest):
        """Read the last line of the answer and compare the hash in it."""
        self.coming = None
        sha256, = fields(self.client.link.answer(work_time(self.size)), "sha256")
        if self.client.verify and (sha256 or "").lower() != digest.hexdigest():
            raise Failed("what arrived does not have the SHA-256 that the server tells")

    def store(self, mtime):
        path, duplicate = self.target.publish(mtime, self.replace)
        self.client.folders.add(self.target.folder or ".")
        self.outcome = ("already here as %s" if duplicate else "saved as %s") % path

    def drop(self):
        self.target.close()

    def read_past(self):
        if self.coming is None:
            return True
        with contextlib.suppress(Broken, Failed):
            while 0 < self.coming <= SMALL:
                self.coming -= len(self.client.link.read(self.coming))
            if not self.coming:
                self.client.link.answer(work_time(self.size))
                return True
        return False

    def classic(self):
        """The same in the original's dialect: all from the start, without a hash."""
        link = self.client.link
        link.classic_request("get", self.name, "0")
        size = link.classic_answer(rb"YES\|([0-9]{1,19})|NO\|0", b"YES|", b"NO|0").group(1)
        self.client.known = True
        if size is None:
            raise Failed("the server has no such file")
        self.resize(int(size))
        link.classic_request("second_active")
        link.flush()
        self.begin("<-", 0)
        self.coming = self.size
        self.open_at(0)
        self.check_room()
        self.receive(None)
        self.store(None)


# ==== Client: many jobs over one connection ===============================================================

class FtpClient:
    """A connection to a server, made again when it breaks, and what can be asked over it."""

    def __init__(self, host, port, options):
        self.port = (host, port)                # as in the original: the address
        self.options, self.verify = options, not options.no_verify
        self.hashing = {} if self.verify else {"verify": False}     # what a put or a get says of it
        self.classic, self.known = options.classic, False       # the dialect, and whether the server has spoken it
        self.link, self.tries, self.window = None, 0, WINDOW
        self.todo, self.asked = collections.deque(), 0      # jobs to do; so many of them, the first ones, are under way
        self.failed = []                        # what the command that runs could not do
        self.left_out = []                      # what a listing holds that we could not ask for or must not show
        self.bar = Bar(0, 0, False)

    # ---- connection ----

    def create_socket(self):
        """Connect and say hello, unless there is a connection that still lives. Raises Unreachable."""
        if self.link and not self.asked and self.link.answered():
            self.close()                        # idle for too long: the server has said goodbye
        if self.link:
            return
        try:
            sock = socket.create_connection(self.port, self.options.timeout)
        except (OSError, UnicodeError) as error:
            raise Unreachable(advice(error, self.port, self.options.timeout)) from None
        self.link = Link(sock, self.options.timeout, self.show)
        for job in itertools.islice(self.todo, self.asked):
            job.ask_first()
        self.asked = 0                          # what was under way has to be asked for again
        if not self.classic:
            self.greet(self.link)

    def greet(self, link):
        """Say hello in the framed dialect; to a server that hangs up on it, speak the classic one."""
        try:
            link.request(cmd="hello")
            link.answer()
            self.known = True
        except BaseException as error:      # a time limit, Ctrl-C: a late answer must not be taken for the next one
            self.close()
            if isinstance(error, HungUp) and not link.ahead and not self.known:
                note("the server hung up on the framed hello: speaking the classic dialect")
                self.classic = True
                return self.create_socket()
            if isinstance(error, (Failed, Broken)):
                why = "it is no ftp_server.py" if isinstance(error, BadMessage) else reason(error)
                raise Unreachable("no welcome from %s port %d (%s): check the port, or try again later"
                                  % (self.port + (why,))) from None
            raise

    def close(self):
        link, self.link = self.link, None
        if link:
            link.sock.close()

    def recover(self, why):
        """Take a broken connection up again, with growing pauses; False where that was done often enough already.

        Raises Unreachable when there is no connection to be had."""
        while self.tries < self.options.retries:
            pause = min(FIRST_PAUSE * 2 ** min(self.tries, 9), LAST_PAUSE)
            self.tries += 1
            self.bar.clear()
            note("interrupted (%s): next try in %g s, %d of %d" % (why, pause, self.tries, self.options.retries))
            time.sleep(pause)
            try:
                self.create_socket()
                return True
            except Unreachable as error:
                why = error
        if isinstance(why, Unreachable):
            raise Unreachable("given up: %s" % why)
        return False

    def show(self, direction, data):
        """Show what crosses the wire, for --explain."""
        if self.options.explain:
            self.bar.clear()
            note("%s %s" % (direction, data.decode("utf-8", "replace").rstrip()))

    # ---- jobs ----

    def run(self, jobs):
        """Do jobs, many of them under way at a time; go on after a failure. True where all of the command went well."""
        self.todo, self.asked, self.folders = collections.deque(jobs), 0, set()
        self.tries, self.window = 0, WINDOW
        self.bar = Bar(len(jobs), sum(job.size for job in jobs), self.options.bar)
        try:
            if jobs:
                self.create_socket()            # a server that has gone while nothing was moved is not waited for
            while self.todo:
                try:
                    self.turn()
                except (Broken, Unreachable) as error:
                    self.close()
                    if self.todo:               # else all answers came before it broke
                        self.go_on(error)
        except Unreachable as error:
            for job in self.todo:
                self.fail(job.name, error)
        except BaseException:                   # Ctrl-C: who knows where in the stream we are
            self.close()
            raise
        finally:
            for job in self.todo:
                job.drop()
            self.bar.clear()
            for folder in self.folders:             # once for all files in it
                sync_folder(folder)
        if self.bar.finished + len(self.failed) > 1:
            self.summary()
        return not self.failed

    def go_on(self, error):
        """Take a connection that broke up again; if that was done often enough, without the file that is next."""
        self.window = 1             # what is sent in vain must not use up each connection
        if not self.recover(error):
            job = self.todo.popleft()
            job.drop()
            self.fail(job.name, "given up: %s" % error)
            self.tries = max(0, self.options.retries - 1)       # the next one has a try of its own

    def turn(self):
        """Ask for as many files as may be under way, then take answers until half of them are done."""
        self.create_socket()
        if self.classic:                    # one job, one connection: the original mixes up the files of a connection
            self.asked = 1
            self.take_answer()
            return self.close()
        try:
            names = sum(len(job.name) for job in itertools.islice(self.todo, self.asked))
            while self.link and names < NAMES and self.may_ask():
                names += len(self.todo[self.asked].name)
                self.ask_next()
            if self.link:
                self.link.flush()
        except Broken:
            while self.asked and self.link and self.link.answered():    # what came before it broke counts
                self.take_answer()
            raise
        rest = self.asked // 2
        while self.link and self.asked > rest:
            self.take_answer()

    def may_ask(self):
        """Tell whether the next file may be asked for before the first answer is taken."""
        if self.asked in (0, len(self.todo)):
            return self.asked < len(self.todo)
        alone = self.todo[self.asked].alone or self.todo[self.asked - 1].alone
        return not alone and self.asked < self.window

    def ask_next(self):
        self.asked += 1
        job = self.todo[self.asked - 1]
        if not self.attempt(job, job.ask):
            self.asked -= 1
            del self.todo[self.asked]

    def take_answer(self):
        """Finish the file that was asked for first."""
        job = self.todo[0]
        done = self.attempt(job, job.classic if self.classic else job.finish)
        self.todo.popleft()
        self.asked -= 1
        if done:
            self.tell(job)

    def attempt(self, job, step):
        """Do a step of a job; False where it failed for good. What it leaves in the stream is read, or goes with the
        link."""
        try:
            step()
            return True
        except (Failed, OSError, RecursionError) as error:
            if self.classic or isinstance(error, BadMessage) or not job.read_past():
                self.close()
            self.fail(job.name, reason(error))
        job.drop()
        return False

    def fail(self, label, why):
        self.failed.append(label)
        self.bar.clear()
        text = str(why)                         # of this machine's errors many begin with the name
        note(text if text.startswith(label + ": ") else "%s: %s" % (label, text))

    @contextlib.contextmanager
    def telling(self, label):
        """Tell what fails in the block, and go on behind it."""
        try:
            yield
        except (Failed, OSError, RecursionError, re.error) as error:
            self.fail(label, reason(error))

    def tell(self, job):
        self.tries, self.window = 0, min(WINDOW, self.window + 1)
        self.bar.finished += 1
        if not self.options.quiet:
            self.bar.clear()
            say("%s: %s" % (job.name, job.outcome))

    def stopped(self):
        """What to say at Ctrl-C."""
        return "stopped" + ("; the same command goes on where it was" if self.bar.files and not self.classic else "")

    def summary(self):
        done, moved, seconds = self.bar.finished, self.bar.moved, time.perf_counter() - self.bar.start
        text = "%d of %d done, %s in %.1f s, %s/s" % (done, done + len(self.failed), human(moved), seconds,
                                                      human(moved / max(seconds, 1e-6)))
        if self.failed:
            note("%s; failed: %s" % (text, ", ".join(self.failed)))
        elif not self.options.quiet:
            say(text)

    # ---- what can be asked ----

    def ls(self, path, recursive=False):
        """What the server has under path: a list of {"name", "type", "size", "mtime"}, checked.

        It is asked again where the connection breaks."""
        self.tries = 0
        while True:
            try:
                return self.ls_once(path, recursive)
            except Broken as error:
                if not self.recover(error):
                    raise Failed("given up: %s" % error) from None

    def ls_once(self, path, recursive=False):
        self.create_socket()
        if self.classic:
            raise Failed("the classic dialect can't list")
        try:
            self.link.request(cmd="ls", path=path, recursive=recursive)
            lines = self.read_listing()
        except Refusal:
            raise
        except BaseException:       # what is left of the answer must not be taken for the next one
            self.close()
            raise
        entries = (self.entry_of(line) for line in lines if line != b"\n")
        return [entry for entry in entries if entry and (recursive or "/" not in entry["name"])]

    def read_listing(self):
        left, left_out = fields(self.link.answer(), "size", "left_out")
        self.show("<-", b"%d bytes" % left)
        if left > LISTING_LIMIT:
            raise BadMessage("a listing of %d bytes" % left)
        listing = bytearray()
        while len(listing) < left:
            listing += self.link.read(left - len(listing))
        if left_out:
            self.left_out.append("left out of the listing: " + left_out)
        return io.BytesIO(listing)              # split() would make objects of millions of empty lines at once

    def entry_of(self, line):
        """An entry of a listing; None for one that is left out."""
        name = "a line"
        try:
            if len(line) > HEADER_LIMIT:
                raise BadMessage("%d bytes" % len(line))
            entry = decode(line)
            name, _, entry["mtime"] = fields(entry, "name", "size", "mtime")
            entry["parts"] = split_name(name)
            return entry if entry.get("type") in ("file", "dir") else None
        except Failed as error:
            if len(self.left_out) < 1000:       # what has more of it is no listing, and must not fill our memory
                self.left_out.append("%s of the listing is left out: %s" % (name, error))
            return None

    def find_remote(self, pattern):
        """The remote names that a pattern stands for: a list of entries with full names."""
        *folders, last = pattern.split("/")
        parents, wild = [""], False
        for part in folders:
            if WILD.search(part):
                parents = [parent + entry["name"] + "/" for parent in parents
                           for entry in self.matching(parent, part, wild) if entry["type"] == "dir"]
                wild = True
            else:
                parents = [parent + part + "/" for parent in parents]
        return [dict(entry, name=parent + entry["name"]) for parent in parents
                for entry in self.matching(parent, last, wild)]

    def matching(self, parent, pattern, wild):
        """The entries of a remote folder that match a pattern; one that is literally there counts as that.

        wild: the folder's own name comes from a pattern, so it need not be there."""
        try:
            entries = self.ls(parent.rstrip("/"))
        except Refusal as error:
            if not wild:
                raise
            if error.code not in ("not-found", "not-a-file"):       # a folder that is not for us hides no others
                self.fail(parent.rstrip("/"), error)
            return []
        exact = [entry for entry in entries if entry["name"] == pattern]
        return exact or [entry for entry in entries if fnmatch.fnmatchcase(entry["name"], pattern)
                         and entry["name"].startswith(".") <= pattern.startswith(".")]      # as in a shell


def advice(error, address, timeout):
    """A line that says why there is no connection and what to check."""
    host, port = address
    if isinstance(error, (socket.gaierror, UnicodeError)):
        return "unknown host %s: check the spelling, or use the address that the server prints" % host
    if isinstance(error, ConnectionRefusedError):
        return "%s refuses port %d: is ftp_server.py running there, for this address (0.0.0.0 lets others in too) and " \
               "port, and does its firewall let us in?" % address
    if isinstance(error, socket.timeout) or error.errno == errno.ETIMEDOUT:
        return "no answer from %s port %d in %g s: is it running? Check address, port, network and its firewall" % (
            host, port, timeout)
    return "can't connect to %s port %d (%s): check the address, the port and the network" % (host, port, error.strerror or error)


# ==== Discovery: which servers are there? ===================================================================

def find_servers(address, port_number, show):
    """Ask by one UDP datagram, wait FIND_TIME; the answers: a list of (address, port, mode, host name)."""
    family, _, _, _, target = socket.getaddrinfo(address, port_number, type=socket.SOCK_DGRAM)[0]
    found, limit = set(), time.monotonic() + FIND_TIME
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        if family == socket.AF_INET:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        request = encode({"cmd": "discover"}).ljust(FIND_SIZE)
        show("->", request)
        sock.sendto(request, target)
        while len(found) < 1000 and time.monotonic() < limit:
            sock.settimeout(max(0.001, limit - time.monotonic()))
            try:
                data, sender = sock.recvfrom(CHUNK)
                show("<-", data)
                answer = decode(data)
            except (OSError, BadMessage):           # the former: time is up or, on Windows, that port is unreachable
                continue
            host, mode, number = (answer.get(key) for key in ("host", "mode", "port"))
            texts = isinstance(host, str) and isinstance(mode, str)
            if answer.get("ok") is True and texts and is_size(number) and 0 < number < 65536:
                found.add((sender[0], number, mode, host))
    return sorted(found)


def show_servers(options, show):
    """Print the servers that answer and how to reach each; the exit code."""
    try:
        found = find_servers(options.find, options.port, show)
    except (OSError, UnicodeError) as error:
        note("can't ask %s: %s" % (options.find, reason(error)))
        return 1
    if not found:
        note("no server answered on UDP port %d: is one running, with this port, and does its firewall let UDP in?"
             % options.port)
        return 1
    for address, number, mode, host in found:
        say("%-15s  %5d  %-12s  %-20s  python ftp_client.py %s %d" % (
            address, number, mode[:40], host[:64], address, number))
    return 0


# ==== Progress bar ========================================================================================

def human(count):
    """A number of bytes for people, in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            break
        count /= 1000
    else:
        unit = "TB"
    return "%d %s" % (count, unit) if unit == "B" else "%.1f %s" % (count, unit)


def columns(text):
    """How many columns of a terminal a text takes: East Asian characters take two."""
    import unicodedata          # here and elsewhere below: what few runs need is loaded only by those
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else not unicodedata.combining(char) for char in text)


def clipped(text, width):
    """As much of the start of a text as fits into so many columns."""
    for end, total in enumerate(itertools.accumulate(map(columns, text))):
        if total > width:
            return text[:end]
    return text


class Bar:
    """One line on stderr for all files of a command; drawn on a terminal only."""

    def __init__(self, files, size, visible):
        self.files, self.size, self.visible = files, size, visible
        self.finished = self.done = self.moved = 0
        self.start = self.drawn = time.perf_counter()        # Windows' monotonic() may have steps of 16 ms
        self.shown = 0              # columns that are drawn

    def add(self, job, count, moved=True):
        self.done += count
        self.moved += count if moved else 0
        if self.visible and (self.done >= self.size or time.perf_counter() - self.drawn > BAR_TIME):
            self.draw(job.name)

    def draw(self, label):
        self.drawn = time.perf_counter()
        try:
            width = max(1, (os.get_terminal_size(sys.stderr.fileno()).columns or 80) - 1)
        except (OSError, ValueError):
            return
        line = self.text(printable(label), width)
        self.shown = width
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write("\r%s%s\r" % (line, " " * (width - columns(line))))
            sys.stderr.flush()

    def text(self, label, width):
        """name, percent, bytes, speed and time left, in at most width columns."""
        speed = self.moved / max(self.drawn - self.start, 1e-6)
        left = max(0, self.size - self.done) / speed if speed else math.inf
        percent = min(100, 100 * self.done // self.size) if self.size else 100
        facts = ""
        for fact in (" %d/%d" % (min(self.finished + 1, self.files), self.files) if self.files > 1 else "",
                     " %3d%%" % percent, " " + human(self.done), " %s/s" % human(speed),
                     " %d:%02d left" % divmod(left, 60) if left < 360000 else ""):
            facts += fact if len(facts + fact) <= width else ""
        encoding = sys.stderr.encoding or "ascii"
        label = label.encode(encoding, "backslashreplace").decode(encoding)
        return clipped(label, width - len(facts)) + facts

    def clear(self):
        """Take the line away, so that another can be printed."""
        if self.shown:
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write("\r%s\r" % (" " * self.shown))
                sys.stderr.flush()
            self.shown = 0


# ==== Commands: what can be typed at the prompt ===========================================================

class Usage(Exception):
    """A command that is typed wrong; str() is its line of help."""


def parse_command(words):
    """Split the words of a command into (function, {"-r": …}, names). Raises Usage."""
    if words[0].startswith("!"):
        return do_shell, {}, words
    if words[0] not in COMMANDS:
        raise Usage("no command %s; help lists them" % words[0])
    function, letters, least, most = COMMANDS[words[0]]
    try:
        options, names = getopt.gnu_getopt(words[1:], letters)
        if not least <= len(names) <= most:
            raise getopt.GetoptError("too few names" if len(names) < least else "too many names")
    except getopt.GetoptError as error:
        raise Usage("%s; usage: %s" % (error, re.sub(" {2,}", "  ", function.__doc__))) from None
    return function, dict(options), names


def do_put(client, options, names):
    """put FILE... [-r]             send files; -r: folders too"""
    jobs = []
    for name in names:
        with client.telling(name):
            path = local(name)
            found = [path] if os.path.lexists(path) else sorted(glob.glob(path))
            if not found:
                raise Failed("no such file")
            for path in found:
                add_put(client, path, "-r" in options, jobs)
    return client.run(jobs)


def local(name):
    """A local name as it was typed: ~ is the user's home, unless something here has that name."""
    return name if os.path.lexists(name) else os.path.expanduser(name)


def add_put(client, path, recursive, jobs):
    """Add the jobs for a local file, or for a folder and all in it."""
    top = os.path.basename(os.path.abspath(path))
    if not (recursive and os.path.isdir(path)):
        with client.telling(path):
            jobs.append(Put(client, path, top))
        return
    for folder, folders, files in os.walk(path, onerror=lambda error: client.fail(error.filename, error.strerror)):
        inner = os.path.relpath(folder, path)
        name = top if inner == "." else os.path.join(top, inner)
        folders.sort()
        links = [link for link in folders if os.path.islink(os.path.join(folder, link))]
        files = sorted(file for file in files if not UNFINISHED.fullmatch(file))    # what a get has begun here
        if not files and len(links) == len(folders):
            with client.telling(name):
                jobs.append(MakeFolder(client, name))
        for file in files:
            file_path = os.path.join(folder, file)
            with client.telling(file_path):
                jobs.append(Put(client, file_path, os.path.join(name, file)))
        for link in links:
            client.fail(os.path.join(folder, link), "a link to a folder, left out")


def do_get(client, options, names):
    """get NAME... [-r] [-f] [-o PATH]   fetch files; -r: folders too, -f: replace, -o: under that name or into that folder"""
    out = local(options.get("-o", ""))
    if out and os.path.basename(out) in ("", os.curdir, os.pardir):
        os.makedirs(out, exist_ok=True)
    found, jobs = {}, []
    for name in names:
        with client.telling(name):
            found.update((entry["name"], entry) for entry in entries_of(client, typed(name), "-r" in options))
    if len(found) > 1 and out and not os.path.isdir(out):
        raise Usage("-o must name a folder that exists, for several files")
    for name, entry in found.items():
        with client.telling(name):
            add_get(client, entry, options, out, jobs)
    return client.run(one_for_each_path(client, jobs) if "-f" in options else jobs)


def one_for_each_path(client, jobs):
    """Of jobs that would replace each other's files the first only; the others fail."""
    first = {}
    for job in jobs:
        other = first.setdefault(os.path.normcase(job.target.path), job)
        if other is not job:
            client.fail(job.name, "%s is saved as %s already: give one of them another place with -o" % (other.name, job.target.path))
    return list(first.values())


def typed(name):
    """A remote name as it was typed, without what stands for this folder or its end; "" for all. Raises Refusal."""
    if name and name.rstrip("/") in ("", "."):
        return ""
    with contextlib.suppress(ValueError):           # not Unicode: split_name() will say so
        name = from_disk(name)
    name = name[2 * name.startswith("./"):].rstrip("/")
    split_name(name)
    return name


def entries_of(client, name, recursive):
    """What a remote name or a pattern stands for: a list of entries with full names."""
    client.create_socket()                          # now we know the dialect
    if client.classic and not name:
        raise Failed("the classic dialect can't list")
    if client.classic or name and not (recursive or WILD.search(name)):
        return [{"name": name, "type": "file", "size": 0}]
    if not name and not recursive:
        raise Failed("a folder: use get -r")
    entries = client.find_remote(name) if name else client.ls("")
    if not entries:
        raise Failed("no such file on the server")
    return entries


def add_get(client, entry, options, out, jobs):
    """Add the jobs for an entry, and for all in it if it is a folder."""
    name, top, replace = entry["name"], local_path(entry["name"], out), "-f" in options
    if entry["type"] == "file":
        jobs.append(Get(client, name, top, entry["size"], replace))
        return
    if "-r" not in options:
        raise Failed("a folder: use get -r")
    for inner in client.ls(name, recursive=True):
        path, inner_name = os.path.join(top, *map(to_disk, inner["parts"])), name + "/" + inner["name"]
        with client.telling(inner_name):
            if inner["type"] == "dir":
                os.makedirs(path, exist_ok=True)
            else:
                jobs.append(Get(client, inner_name, path, inner["size"], replace))
    os.makedirs(top, exist_ok=True)


def local_path(name, out):
    """Where a remote file or folder is saved: by the last part of its name here or in the folder out, or as out."""
    part, = split_name(name.rsplit("/", 1)[-1])
    return os.path.join(out, to_disk(part)) if not out or os.path.isdir(out) else out


def do_ls(client, options, names):
    """ls [PATH]                    what the server has; PATH may be a pattern"""
    name = names[0] if names else "."
    try:
        show_entries(entries_in(client, typed(name)))
    except (Refusal, re.error) as error:
        client.fail(name, reason(error))
    return not client.failed


def entries_in(client, name):
    """What is in a remote folder, or what a pattern stands for where no folder has that name."""
    if WILD.search(name):
        entries = client.find_remote(name)
        if entries and (entries[0]["name"], entries[0]["type"]) != (name, "dir"):
            return entries
    return client.ls(name)


def show_entries(entries):
    """Print a list of entries. Raises OSError where that can't be done: here, what is printed is the result."""
    for entry in entries:
        size = "folder" if entry["type"] == "dir" else entry["size"]
        try:
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry["mtime"] or 0))
        except (OSError, OverflowError, ValueError):        # a time that this system can't tell
            when = "%16s" % "?"
        write_line("%14s  %s  %s" % (size, when, entry["name"]), sys.stdout)


def do_lcd(client, options, names):
    """lcd [DIR]                    go to a folder on this machine; alone: home"""
    os.chdir(local(names[0]) if names else os.path.expanduser("~"))
    say(os.getcwd())
    return True


def do_lls(client, options, names):
    """lls [DIR]                    what is in a folder on this machine"""
    folder = local(names[0] if names else ".")
    entries = []
    for name in sorted(os.listdir(folder)):
        with contextlib.suppress(FileNotFoundError):
            info = os.lstat(os.path.join(folder, name))
            entries.append({"name": name, "type": "dir" if stat.S_ISDIR(info.st_mode) else "file", "size": info.st_size,
                            "mtime": info.st_mtime})
    show_entries(entries)
    return True


def do_help(client, options, names):
    """help [COMMAND]               this list; ? is short for it"""
    for name in names or ["put", "get", "ls", "lcd", "lls", "help", "exit", "!"]:
        if name not in COMMANDS:
            raise Usage("no command %s; help lists them" % name)
        say(COMMANDS[name][0].__doc__)
    return True


def do_shell(client, options, words):
    """!COMMAND                     run a command of this machine's shell"""
    status = os.system(" ".join(words)[1:])
    if os.name != "nt" and status in (2, 130 << 8):     # Ctrl-C ended the shell, or what it ran
        raise KeyboardInterrupt
    return status == 0


def do_leave(client, options, names):
    """exit() exit quit bye         leave; so does Ctrl-D (Windows: Ctrl-Z, Enter)"""
    sys.exit()


COMMANDS = {                # word: (function, letters of its options, fewest and most names)
    "put": (do_put, "r", 1, math.inf), "get": (do_get, "rfo:", 1, math.inf), "ls": (do_ls, "", 0, 1),
    "lcd": (do_lcd, "", 0, 1), "lls": (do_lls, "", 0, 1), "help": (do_help, "", 0, 1), "?": (do_help, "", 0, 1),
    "!": (do_shell, "", 0, math.inf),
}
COMMANDS.update((word, (do_leave, "", 0, 0)) for word in ("exit()", "exit", "quit", "bye"))


def split_words(line):
    """Split a line into words; quotes hold one together, a backslash is just a character (Windows paths)."""
    import shlex
    words = shlex.shlex(line, posix=True)
    words.whitespace_split, words.escape, words.commenters = True, "", ""
    try:
        return list(words)
    except ValueError:
        raise Usage("a quote is not closed; a name that holds ' goes between two \"") from None


def run_command(client, words):
    """Run one command; True where all went well. Whatever fails is one line, on stderr."""
    try:
        function, options, names = parse_command(words)
        client.left_out, client.failed, client.bar = [], [], Bar(0, 0, False)
        well = function(client, options, names)
        for text in client.left_out:
            note(text)
        return well and not client.left_out
    except (Failed, Unreachable, OSError, RecursionError, ValueError) as error:
        note(reason(error))                     # ValueError: a name that the system can't even be asked for
    return False


def command_fanout(client):
    """The prompt: read commands until the user has enough."""
    if None in (sys.stdin, sys.stdout):
        raise Usage("the prompt needs an input and an output: name a command after HOST and PORT")
    with contextlib.suppress(AttributeError):       # Python 3.6 lacks it: one bad byte costs a whole buffer of lines there
        sys.stdin.reconfigure(errors="surrogateescape")
    with contextlib.suppress(ImportError):
        set_up_readline(client)
    line = None
    while True:
        if line and not client.known:       # nobody answered, as behind a tunnel whose server is down: ask anew for the dialect
            client.close()
            client.classic = client.options.classic
        line = None
        try:
            line = input(">>>").strip()
            if line:
                run_command(client, [line] if line.startswith("!") else split_words(line))
        except Usage as error:
            note(str(error))
        except ValueError:
            note("that line is not text in this terminal's encoding")
        except KeyboardInterrupt:
            client.close()              # who knows where in the stream we are
            note(client.stopped() if line else "")
        except (EOFError, OSError):         # the latter: nobody reads what is printed
            return say("")


# ==== Tab completion ======================================================================================

def set_up_readline(client):
    """History, and Tab for commands, local names after put and remote ones after get and ls."""
    import readline
    found = []

    def complete(text, number):
        """The number-th completion of text, the last word of the line; None behind the last one."""
        if number == 0:
            found.clear()
            with contextlib.suppress(Failed, Broken, Unreachable, OSError):
                found.extend(completions(client, text, readline.get_line_buffer()[:readline.get_endidx()]))
        return found[number] if number < len(found) else None

    readline.set_completer_delims(" \t\n")
    readline.set_completer(complete)
    readline.parse_and_bind("bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else "tab: complete")


def completions(client, text, line):
    """All completions. A name with a space is put in quotes, of which text may hold the end only."""
    command, *rest = line.lstrip().split(" ", 1)
    if not rest:
        return [name + " " for name in sorted(COMMANDS) if name.startswith(text)]
    quote = ""                  # the one that is open at the end
    for char in line:
        if char in "\"'" and quote in ("", char):
            quote = "" if quote else char
    word = line.rsplit(quote, 1)[1] if quote else text
    names = complete_remote(client, word) if command in ("get", "ls") else complete_local(word)
    before = len(quote + word) - len(text)      # characters in front of those that readline replaces
    if before < 0:                              # the quote is inside a word
        return []
    found = []
    for name in names:
        mark = quote or ("'" if "\"" in name else "\"" if re.search(r"[\s']", name) else "")
        if mark and mark in name:       # nothing that can be typed stands for it
            continue
        end = "" if name.endswith("/") else mark + " "
        found.append((mark + name + end)[before:])
    return found


def complete_local(word):
    head = word[:word.find("/") + 1] if word.startswith("~") else ""        # ~/ or ~user/
    home = os.path.expanduser(head)
    paths = sorted(glob.glob(glob.escape(home + word[len(head):]) + "*"))
    return [head + path[len(home):].replace(os.sep, "/") + ("/" if os.path.isdir(path) else "") for path in paths]


def complete_remote(client, word):
    folder = word.rpartition("/")[0]
    prefix = folder + "/" if folder else ""
    return [prefix + entry["name"] + ("/" if entry["type"] == "dir" else "") for entry in client.ls_once(folder)
            if (prefix + entry["name"]).startswith(word) and not BIDI.search(entry["name"])]  # readline escapes nothing


# ==== Command line ========================================================================================

def printable(text):
    """The text with all that could command a terminal escaped."""
    return text if text.isprintable() else "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def write_line(text, stream):
    """Print a line, also where the terminal's encoding lacks its characters."""
    if stream is not None:          # no terminal at all
        encoding = stream.encoding or "ascii"
        stream.write(printable(text).encode(encoding, "backslashreplace").decode(encoding) + "\n")  # one write: threads
        stream.flush()


def say(text, stream=None):
    """Print a line if that can be done: a closed terminal must not end transfers."""
    with contextlib.suppress(OSError, ValueError):
        write_line(text, stream or sys.stdout)


def note(text):
    """Print a line about something that went wrong."""
    say(text, sys.stderr)


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
    if not re.fullmatch("[0-9]{1,9}", text):
        raise argparse.ArgumentTypeError("%r is not a number" % text)
    return int(text)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        prog="ftp_client.py", allow_abbrev=False, usage="%(prog)s [HOST [PORT [COMMAND ARG...]]] [options]",
        description="Move files to and from an ftp_server.py. Without a COMMAND there is a prompt. "
                    "By default HOST is 127.0.0.1 and PORT is 8885.",
        epilog="Commands: put FILE... [-r], get NAME... [-r] [-f] [-o PATH], ls [PATH]; help at the prompt tells more.")
    add = parser.add_argument
    add("--classic", action="store_true", help="speak the original's dialect")
    add("--no-verify", action="store_true", help="don't hash what is moved")
    add("--retries", type=count, default=5, metavar="N", help="tries in a row to take up a broken connection (default: %(default)s)")
    add("--timeout", type=seconds, default=60, metavar="SECONDS", help="until a silent server is given up (default: %(default)s)")
    add("--find", nargs="?", const="255.255.255.255", metavar="ADDRESS", help="ask the network which servers there are, on UDP port PORT")
    add("--explain", action="store_true", help="show every message that crosses the wire")
    add("-q", "--quiet", action="store_true", help="say only what went wrong")
    add("--version", action="version", version="ftp_client.py " + VERSION)
    options, words = parser.parse_known_args(argv)
    if options.find:
        options.find = options.find.strip("[]")     # an IPv6 address as the server prints it
        if len(words) == 1:
            words.insert(0, options.find)           # --find ADDRESS PORT
    for word in words[:2]:
        if word.startswith("-") and len(word) > 1:
            parser.error("unrecognized option %s" % word)
    both = re.fullmatch(r"([^:]+|\[.+\]):([0-9]+)", words[0]) if words else None
    if both:
        parser.error("HOST and PORT are two words: %s %s" % both.groups())
    if words and re.fullmatch("[0-9]+", words[0]):
        parser.error("HOST comes before PORT: 127.0.0.1 %s" % words[0])
    options.host = words[0].strip("[]") if words else "127.0.0.1"
    options.command = words[2:]
    try:
        options.port = port(words[1]) if len(words) > 1 else PORT
        if options.command:
            parse_command(options.command)
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    except Usage as error:
        parser.exit(2, "ftp_client.py: %s\n" % printable(str(error)))
    options.bar = sys.stderr is not None and sys.stderr.isatty() and not options.quiet
    return options


def main(argv=None):
    client = None
    try:
        options = parse_args(argv)
        client = FtpClient(options.host, options.port, options)
        with contextlib.closing(client):
            if options.find:
                return show_servers(options, client.show)
            if not options.command or options.command[0] in ("put", "get", "ls"):
                client.create_socket()
            if options.command:
                return 0 if run_command(client, options.command) else 1
            if not options.quiet:
                say("connected to %s port %d; help lists the commands" % client.port)
            command_fanout(client)
            return 0
    except Usage as error:
        note(str(error))
        return 2
    except Unreachable as error:
        note(str(error))
        return 1
    except KeyboardInterrupt:
        note(client.stopped() if client else "stopped")
        return 130


if __name__ == "__main__":
    sys.exit(main())
