# Makes files and directories that somebody else makes at the same time, and tells how many were its own.
import os, sys

name, count = sys.argv[1], int(sys.argv[2])
open(f"ready-{name}", "w").close()
while not os.path.exists("go"):
    pass
made = 0
for number in range(count):
    try:
        file = os.open(f"file-{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        os.write(file, f"{name}\n".encode())
        os.close(file)
        made += 1
    except FileExistsError:
        pass
    try:
        os.mkdir(f"directory-{number}")
        made += 1
    except FileExistsError:
        pass
    # Without O_EXCL both may have it, whoever made it.
    with open(f"shared-{number}", "a") as shared:
        shared.write(name[0])
print(made)
