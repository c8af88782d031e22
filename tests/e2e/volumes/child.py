# What a step does is done by a process of its own: a beginning of other programs.
import errno, os


def in_child(action):
    """What a child process prints, after which it is gone."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            text = str(action())
        except OSError as error:
            text = errno.errorcode[error.errno]
        os.write(writer, text.encode())
        os._exit(0)
    os.close(writer)
    text = open(reader).read()
    os.waitpid(child, 0)
    return text


