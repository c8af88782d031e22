# Looks at a file that it has open and mapped, each time after the host has done something to it.
import errno, mmap, os, time

file = os.open("file", os.O_RDWR)
memory = mmap.mmap(file, 8192)
print("mapped", memory[8187:8192])


def attempt(what, action):
    try:
        print(what, action())
    except OSError as error:
        print(what, errno.errorcode[error.errno])


for step in range(8):
    while not os.path.exists(f"step-{step}"):
        time.sleep(0.05)
    # What the attributes say is what they said a moment ago.
    time.sleep(0.2)
    status = os.fstat(file)
    print(step, "open", status.st_size, status.st_nlink, os.pread(file, 8, max(status.st_size - 6, 0)))
    attempt("  by name", lambda: os.stat("file").st_size)
    attempt("  by name", lambda: open("file").read()[-7:])
    if status.st_size >= 8192:
        print("  mapped", memory[8185:8192])
    if step == 6:
        print("  written", os.pwrite(file, b"to nobody", 0), os.pread(file, 9, 0))
    open(f"seen-{step}", "w").close()
