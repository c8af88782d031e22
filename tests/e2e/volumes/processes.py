# What processes of one container do with each other by way of a volume. Run in the volume's directory.
import ctypes, errno, fcntl, os, select, socket, struct, time

libc = ctypes.CDLL(None, use_errno=True)
OFD_SETLK = 37


def lock(kind, start=0, length=0):
    return struct.pack("hhqqi", kind, os.SEEK_SET, start, length, 0)


def opened():
    return os.open("file", os.O_RDWR | os.O_CREAT)


file = opened()

# flock: of open files.
fcntl.flock(file, fcntl.LOCK_EX)
print("flock", in_child(lambda: fcntl.flock(opened(), fcntl.LOCK_EX | fcntl.LOCK_NB)))
print("inherited", in_child(lambda: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)))
fcntl.flock(file, fcntl.LOCK_SH)
print("shared", in_child(lambda: fcntl.flock(opened(), fcntl.LOCK_SH | fcntl.LOCK_NB)))
print("shared and exclusive", in_child(lambda: fcntl.flock(opened(), fcntl.LOCK_EX | fcntl.LOCK_NB)))
fcntl.flock(file, fcntl.LOCK_UN)
print("free", in_child(lambda: fcntl.flock(opened(), fcntl.LOCK_EX | fcntl.LOCK_NB)))

# fcntl: of processes, by ranges.
fcntl.lockf(file, fcntl.LOCK_EX, 10, 0)
print("record", in_child(lambda: fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 5)))
print("beside it", in_child(lambda: fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 10)))
held = in_child(lambda: struct.unpack("hhqqi", fcntl.fcntl(file, fcntl.F_GETLK, lock(fcntl.F_WRLCK)))[:4])
print("who holds it", held)
os.close(opened())
print("closed elsewhere", in_child(lambda: fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 5)))
fcntl.lockf(file, fcntl.LOCK_EX)
child = os.fork()
if child == 0:
    fcntl.lockf(file, fcntl.LOCK_EX)
    os.write(file, b"after")
    os._exit(0)
time.sleep(0.3)
before = os.fstat(file).st_size
fcntl.lockf(file, fcntl.LOCK_UN)
os.waitpid(child, 0)
print("waited", before, os.fstat(file).st_size)

# Open file description locks: of open files, by ranges.
fcntl.fcntl(file, OFD_SETLK, lock(fcntl.F_WRLCK, 0, 100))
print("description", in_child(lambda: fcntl.fcntl(opened(), OFD_SETLK, lock(fcntl.F_WRLCK, 50, 1))))
print("inherited", in_child(lambda: len(fcntl.fcntl(file, OFD_SETLK, lock(fcntl.F_WRLCK, 50, 1)))))
print("beside it", in_child(lambda: len(fcntl.fcntl(opened(), OFD_SETLK, lock(fcntl.F_WRLCK, 100, 1)))))
os.close(file)
print("closed", in_child(lambda: len(fcntl.fcntl(opened(), OFD_SETLK, lock(fcntl.F_WRLCK, 0, 100)))))

# Sockets.
server = socket.socket(socket.AF_UNIX)
server.bind("socket")
server.listen()


def talk():
    client = socket.socket(socket.AF_UNIX)
    client.connect("socket")
    client.send(b"ping")
    return client.recv(10)


child = os.fork()
if child == 0:
    connection, _ = server.accept()
    connection.send(connection.recv(10) + b"-pong")
    os._exit(0)
print("socket", in_child(talk), oct(os.stat("socket").st_mode))
os.waitpid(child, 0)
server.close()
print("nobody listens", in_child(talk))
datagrams = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
datagrams.bind("datagrams")
in_child(lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b"datagram", "datagrams"))
print(datagrams.recv(20))

# FIFOs.
os.mkfifo("fifo")
try:
    os.open("fifo", os.O_WRONLY | os.O_NONBLOCK)
except OSError as error:
    print("no reader", errno.errorcode[error.errno])
child = os.fork()
if child == 0:
    open("fifo", "w").write("through the fifo")
    os._exit(0)
print(open("fifo").read())
os.waitpid(child, 0)

# inotify.
NAMES = {1: "access", 2: "modify", 4: "attrib", 8: "close write", 16: "close", 32: "open", 64: "moved from", 128: "moved to", 256: "create", 512: "delete"}
os.mkdir("watched")
watch = libc.inotify_init1(os.O_NONBLOCK)
libc.inotify_add_watch(watch, b"watched", 0x3CE)
in_child(lambda: open("watched/new", "w").write("x"))
in_child(lambda: os.rename("watched/new", "watched/renamed"))
in_child(lambda: os.chmod("watched/renamed", 0o600))
in_child(lambda: os.mkdir("watched/folder"))
in_child(lambda: os.remove("watched/renamed"))
select.select([watch], [], [], 10)
events, offset = os.read(watch, 4096), 0
while offset < len(events):
    _, mask, _, length = struct.unpack_from("iIII", events, offset)
    name = events[offset + 16 : offset + 16 + length].rstrip(b"\0").decode()
    print("inotify", NAMES.get(mask & 0xFFFF, mask), name)
    offset += 16 + length
