# Fills a small disk, and tells which call says that it is full.
import errno, os

def call(name, what, *arguments):
    try:
        result = what(*arguments)
        print(name, "ok")
        return result
    except OSError as error:
        print(name, errno.errorcode[error.errno])

file = call("open", os.open, "file", os.O_CREAT | os.O_WRONLY)
block, written = bytes(65536), 0
try:
    while True:
        written += os.write(file, block)
except OSError as error:
    print("write", errno.errorcode[error.errno], written)
call("close", os.close, file)
print(os.stat("file").st_size)
call("overwrite", os.close, call("open again", os.open, "file", os.O_CREAT | os.O_TRUNC | os.O_WRONLY))
print(os.stat("file").st_size)
for number in range(8):
    new = call(f"create {number}", os.open, f"new-{number}", os.O_CREAT | os.O_WRONLY)
    if new is not None:
        os.close(new)
call("what is there opens", os.close, os.open("file", os.O_CREAT | os.O_RDONLY))
call("mkdir", os.mkdir, "directory")
print(sorted(os.listdir(".")))
