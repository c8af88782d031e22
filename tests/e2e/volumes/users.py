# What users may do to files of a volume. Run as root in the volume's directory.
import errno, os, stat, struct

USERS = [(1000, 1000, []), (1001, 1000, []), (1001, 1001, [1000, 3000]), (1002, 1002, []), (0, 0, [])]


def as_user(user, action, mask=0o022):
    def become_and_act():
        uid, gid, groups = user
        os.setgroups(groups)
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
        os.umask(mask)
        return action()

    return in_child(become_and_act)


def everybody(what, action):
    print(what, *(as_user(user, action) for user in USERS))


def touch(path):
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    status = os.stat(path)
    os.remove(path)
    return f"{status.st_uid}:{status.st_gid}:{stat.S_IMODE(status.st_mode):o}"


def make(name, mode, uid=1000, gid=1000):
    open(name, "w").write("#!/bin/sh\nexit 0\n")
    os.chown(name, uid, gid)
    os.chmod(name, mode)


os.chmod(".", 0o755)
for mode in [0o600, 0o640, 0o644, 0o066, 0o660, 0o711]:
    name = f"f{mode:o}"
    make(name, mode)
    everybody(f"read {mode:o}", lambda: len(open(name).read()))
    everybody(f"write {mode:o}", lambda: os.close(os.open(name, os.O_WRONLY)))
    everybody(f"execute {mode:o}", lambda: os.access(name, os.X_OK))
for mode in [0o700, 0o750, 0o711, 0o2770, 0o1777]:
    name = f"d{mode:o}"
    os.mkdir(name)
    os.chown(name, 1000, 3000 if mode & 0o2000 else 1000)
    os.chmod(name, mode)
    make(f"{name}/known", 0o666)
    everybody(f"list {mode:o}", lambda: len(os.listdir(name)))
    everybody(f"reach {mode:o}", lambda: os.stat(f"{name}/known").st_size)
    everybody(f"create {mode:o}", lambda: touch(f"{name}/new"))
    everybody(f"rename {mode:o}", lambda: (os.rename(f"{name}/known", f"{name}/k"), os.rename(f"{name}/k", f"{name}/known")))
make("mine", 0o644)
everybody("chmod", lambda: os.chmod("mine", 0o644))
everybody("give away", lambda: os.chown("mine", 1001, -1))
os.chown("mine", 1000, 1000)
everybody("to a group", lambda: os.chown("mine", -1, 3000))
os.chown("mine", 1000, 1000)
everybody("touch", lambda: os.utime("mine", (5, 5)))
everybody("node", lambda: os.mknod("node", stat.S_IFCHR | 0o666, os.makedev(1, 3)))
everybody("trusted", lambda: os.setxattr("mine", "user.a", b"1"))
make("suid", 0o6777)
print("set-user-ID is lost to", as_user(USERS[3], lambda: open("suid", "a").write("x")), oct(os.stat("suid").st_mode))
for mask in [0, 0o027, 0o777]:
    os.chmod(".", 0o777)
    print("umask", oct(mask), as_user(USERS[0], lambda: touch("masked"), mask))

# Access control lists.
OWNER, USER, GROUP, GROUP_OF, MASK, OTHERS, NOBODY = 1, 2, 4, 8, 16, 32, 0xFFFFFFFF
ACCESS, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"


def acl(*entries):
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def shown(path, kind):
    try:
        return [struct.unpack_from("<HHI", os.getxattr(path, kind), offset) for offset in range(4, len(os.getxattr(path, kind)), 8)]
    except OSError as error:
        return errno.errorcode[error.errno]


make("listed", 0o600)
os.setxattr("listed", ACCESS, acl((OWNER, 6, NOBODY), (USER, 6, 1001), (GROUP, 0, NOBODY), (GROUP_OF, 4, 3000), (MASK, 4, NOBODY), (OTHERS, 0, NOBODY)))
print("acl", oct(os.stat("listed").st_mode), shown("listed", ACCESS), os.listxattr("listed"))
everybody("read", lambda: len(open("listed").read()))
everybody("write", lambda: os.close(os.open("listed", os.O_WRONLY)))
everybody("set", lambda: os.setxattr("listed", ACCESS, os.getxattr("listed", ACCESS)))
os.chmod("listed", 0o660)
print("chmod", shown("listed", ACCESS))
everybody("write", lambda: os.close(os.open("listed", os.O_WRONLY)))
os.removexattr("listed", ACCESS)
print("none", shown("listed", ACCESS), oct(os.stat("listed").st_mode))
os.mkdir("heirs", 0o700)
os.chown("heirs", 1000, 1000)
os.setxattr("heirs", DEFAULT, acl((OWNER, 7, NOBODY), (USER, 7, 1001), (GROUP, 5, NOBODY), (MASK, 7, NOBODY), (OTHERS, 0, NOBODY)))
os.setxattr("heirs", ACCESS, acl((OWNER, 7, NOBODY), (USER, 7, 1001), (GROUP, 5, NOBODY), (MASK, 7, NOBODY), (OTHERS, 0, NOBODY)))


def heir():
    os.mkdir("heirs/folder", 0o777)
    os.close(os.open("heirs/file", os.O_CREAT | os.O_WRONLY, 0o666))
    return [oct(os.stat(f"heirs/{name}").st_mode) for name in ("folder", "file")]


print("heirs", as_user(USERS[0], heir, 0o077), shown("heirs/file", ACCESS), shown("heirs/folder", ACCESS), shown("heirs/folder", DEFAULT))
everybody("create", lambda: touch("heirs/new"))
everybody("write", lambda: os.close(os.open("heirs/file", os.O_WRONLY)))
make("tool", 0o2755, 1000, 3000)
print("set-group-ID is lost to", as_user(USERS[0], lambda: os.setxattr("tool", ACCESS, acl((OWNER, 7, NOBODY), (USER, 5, 1001), (GROUP, 5, NOBODY), (MASK, 5, NOBODY), (OTHERS, 5, NOBODY)))), oct(os.stat("tool").st_mode))
bad = struct.pack("<I", 2) + b"xx"
try:
    os.setxattr("tool", ACCESS, bad)
except OSError as error:
    print("bad list", errno.errorcode[error.errno])
