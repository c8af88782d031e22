# Reads, writes, maps, cuts and extends a file in pieces of all sizes, many of them large, and knows by itself what has to
# be in it. The host changes a part between the rounds.
import mmap
import os
import random
import sys
import time

MIB = 1 << 20
SIZE = 4 * MIB
PAGE = 4096

chance = random.Random(sys.argv[1])
wanted = bytearray()
done = 0


def place():
    # Many begin where a page does, since that is what programs do.
    offset = chance.randrange(SIZE)
    return offset - offset % PAGE if chance.random() < 0.6 else offset


def length():
    return chance.choice([chance.randrange(1, PAGE), 128 << 10, 256 << 10, MIB, chance.randrange(1, 2 * MIB)])


def store(offset, data):
    if offset > len(wanted):
        wanted.extend(bytes(offset - len(wanted)))
    wanted[offset : offset + len(data)] = data


def write(file):
    offset, data = place(), chance.randbytes(length())
    assert os.pwrite(file, data, offset) == len(data)
    store(offset, data)


def write_in_parts(file):
    offset = place()
    parts = [chance.randbytes(chance.choice([PAGE, 5000, 70000])) for _ in range(6)]
    assert os.pwritev(file, parts, offset) == sum(map(len, parts))
    store(offset, b"".join(parts))


def append(file):
    end = os.open("file", os.O_WRONLY | os.O_APPEND)
    data = chance.randbytes(length())
    assert os.write(end, data) == len(data)
    os.close(end)
    store(len(wanted), data)


def read(file):
    offset, count = place(), length()
    assert os.pread(file, count, offset) == wanted[offset : offset + count], (offset, count)


def map_and_store(file):
    offset = place()
    offset -= offset % PAGE
    count = min(chance.randrange(1, 4 * PAGE), len(wanted) - offset)
    if count <= 0:
        return
    with mmap.mmap(file, count, offset=offset) as view:
        assert view[:] == wanted[offset : offset + count], (offset, count)
        at = chance.randrange(count)
        view[at : at + 1] = b"!"
        wanted[offset + at] = ord("!")
        # Both ways while it is mapped, in pages of which the mapping has some.
        read(file)
        write(file)
        assert view[:] == wanted[offset : offset + count], (offset, count)


def write_from_itself(file):
    offset = place()
    offset -= offset % PAGE
    count = min(256 << 10, len(wanted) - offset)
    if count <= 0:
        return
    with mmap.mmap(file, count, offset=offset, prot=mmap.PROT_READ) as view:
        to = place()
        data = bytes(wanted[offset : offset + count])
        # What is copied over itself is not defined.
        if to + count <= offset or offset + count <= to:
            assert os.pwrite(file, view, to) == count
            store(to, data)


def cut(file):
    size = place()
    os.ftruncate(file, size)
    del wanted[size:]
    wanted.extend(bytes(size - len(wanted)))


WAYS = [write] * 4 + [read] * 6 + [write_in_parts, append, map_and_store, map_and_store, write_from_itself, cut]

file = os.open("file", os.O_RDWR | os.O_CREAT)
for step in range(int(sys.argv[2])):
    for _ in range(60):
        chance.choice(WAYS)(file)
        done += 1
    assert os.pread(file, len(wanted) + MIB, 0) == wanted
    open(f"wrote-{step}", "w").close()
    while not os.path.exists(f"changed-{step}"):
        time.sleep(0.01)
    # The host has put a line over some place, which the program reads without having closed the file.
    store(MIB + 5, b"the host was here")
    for _ in range(3):
        assert os.pread(file, len(wanted) + MIB, 0) == wanted, "what the host wrote is not seen"
print(done, "times as it should be,", len(wanted), "bytes")
