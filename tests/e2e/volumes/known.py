# Knows all that it looks at before the host changes something, and looks again as soon as the host is done.
import os
import sys
import time


def attributes(path):
    status = os.stat(path, follow_symlinks=False)
    return oct(status.st_mode), status.st_size, status.st_uid, status.st_nlink


def contents(path):
    with open(path) as file:
        return file.read()[:20]


def attempt(look, path):
    try:
        return look(path)
    except OSError as error:
        return error.strerror


def xattr(path):
    return os.getxattr(path, "user.note")


def looks():
    yield "names", sorted(name for name in os.listdir(".") if "-" not in name)
    for path in "file", "none", "folder/inner", "moved/inner", "other", "/single", "/etc/copied":
        yield path, attempt(attributes, path), attempt(contents, path), attempt(xattr, path)
    for path in "folder", "moved":
        yield path, attempt(lambda path: oct(os.stat(path).st_mode), path), attempt(os.listdir, path)


known = {}
for step in range(int(sys.argv[1])):
    # Twice, and later than anything is valid for a time.
    list(looks())
    time.sleep(0.1)
    known = {name: seen for name, *seen in looks()}
    open(f"ready-{step}", "w").close()
    while not os.path.exists(f"done-{step}"):
        pass
    if os.path.exists(f"later-{step}"):
        time.sleep(0.2)
    for name, *seen in looks():
        if seen != known.get(name):
            print(step, name, *seen)
