# What a program may do to files of a volume, and what comes of it. Run in the volume's directory.
import ctypes, errno, mmap, os

libc = ctypes.CDLL(None, use_errno=True)


def attempt(what, action):
    try:
        print(what, action())
    except OSError as error:
        print(what, errno.errorcode[error.errno])


def stat(path):
    status = os.lstat(path)
    return oct(status.st_mode), status.st_nlink, status.st_size


# Names.
open("a", "w").write("text")
os.link("a", "b")
os.symlink("a", "s")
os.link("s", "t", follow_symlinks=False)
print("links", stat("a"), stat("b"), stat("s"), stat("t"), os.path.samefile("a", "b"))
os.mkdir("d")
attempt("rename over a directory", lambda: os.rename("a", "d"))
attempt("link a directory", lambda: os.link("d", "e"))
attempt("remove a full directory", lambda: (open("d/x", "w").close(), os.rmdir("d")))
attempt("exchange", lambda: libc.renameat2(-100, b"a", -100, b"d", 2))
print(stat("a")[0], stat("d")[0])
attempt("no replacement", lambda: (libc.renameat2(-100, b"d", -100, b"b", 1), errno.errorcode[ctypes.get_errno()]))
attempt("long name", lambda: open("n" * 256, "w"))
attempt("odd name", lambda: open("\n \xff".encode("latin1"), "w").close())

# Holes.
hole = os.open("sparse", os.O_RDWR | os.O_CREAT)
os.pwrite(hole, b"x" * 4096, 1 << 20)
print("sparse", os.fstat(hole).st_size, os.fstat(hole).st_blocks <= 16, os.lseek(hole, 0, os.SEEK_DATA), os.lseek(hole, 1 << 20, os.SEEK_HOLE))
attempt("punch", lambda: libc.fallocate(hole, 3, ctypes.c_long(1 << 20), ctypes.c_long(4096)))
attempt("nothing is left", lambda: os.lseek(hole, 0, os.SEEK_DATA))
attempt("reserve", lambda: (os.posix_fallocate(hole, 0, 3 << 20), os.fstat(hole).st_size))
attempt("grow", lambda: (os.ftruncate(hole, 1 << 40), os.fstat(hole).st_size))
attempt("too far", lambda: os.ftruncate(hole, 1 << 62))

# Contents.
append = [os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND) for _ in range(2)]
for number in range(6):
    os.write(append[number % 2], b"%d" % number)
print("append", open("log").read())
unnamed = os.open(".", os.O_RDWR | os.O_TMPFILE, 0o640)
os.write(unnamed, b"named later")
attempt("name", lambda: libc.linkat(-100, b"/proc/self/fd/%d" % unnamed, -100, b"named", 0x400))
print(open("named").read(), stat("named"))
attempt("copy range", lambda: (os.copy_file_range(unnamed, hole, 5, 0, 0), os.pread(hole, 6, 0)))
gone = open("gone", "w+")
os.remove("gone")
gone.write("still there")
gone.flush()
gone.seek(0)
print("without a name", gone.read(), os.fstat(gone.fileno()).st_nlink)

# Memory of two processes.
shared = os.open("shared", os.O_RDWR | os.O_CREAT)
os.ftruncate(shared, 8192)
memory = mmap.mmap(shared, 8192)
if os.fork() == 0:
    other = mmap.mmap(shared, 8192)
    other[4096:4101] = b"child"
    os._exit(0)
os.wait()
print("mmap", memory[4096:4101], os.pread(shared, 5, 4096))
os.pwrite(shared, b"written", 0)
print("mmap", memory[:7])
memory[:6] = b"mapped"
memory.flush()
print("read", os.pread(shared, 7, 0))
private = mmap.mmap(shared, 8192, flags=mmap.MAP_PRIVATE)
private[:1] = b"X"
print("private", os.pread(shared, 1, 0))

# Extended attributes.
attempt("xattr", lambda: (os.setxattr("shared", "user.a", b"1"), os.getxattr("shared", "user.a")))
attempt("once more", lambda: os.setxattr("shared", "user.a", b"2", os.XATTR_CREATE))
attempt("none to replace", lambda: os.setxattr("shared", "user.b", b"2", os.XATTR_REPLACE))
attempt("empty", lambda: (os.setxattr("shared", "user.e", b""), sorted(os.listxattr("shared"))))
attempt("of a directory", lambda: (os.setxattr("d" if os.path.isdir("d") else "a", "user.d", b"d"), "set"))
attempt("of a link", lambda: os.setxattr("s", "user.l", b"l", follow_symlinks=False))
attempt("of a namespace that is none", lambda: os.setxattr("shared", "other.a", b"1"))
attempt("gone", lambda: (os.removexattr("shared", "user.a"), os.getxattr("shared", "user.a")))

# Times and owners.
os.utime("shared", ns=(1_000_000_000_123_456_789, -5))
print("times", os.stat("shared").st_atime_ns, os.stat("shared").st_mtime_ns)
os.utime("s", (7, 8), follow_symlinks=False)
print("times of a link", os.lstat("s").st_mtime)
os.chmod("shared", 0o6755)
os.chown("shared", 12, 34)
print("set-user-ID is lost to chown", stat("shared")[0], os.stat("shared").st_uid, os.stat("shared").st_gid)
os.chmod("shared", 0o6755)
os.write(shared, b"root may")
print("root keeps it", stat("shared")[0])
os.sync()
