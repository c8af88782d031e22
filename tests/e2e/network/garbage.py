# Sends frames without sense from eth0 to a neighbour's hardware address, and to groups: garbage.py ADDRESS COUNT
# Prints how many the kernel took. Some are longer than the wire carries, and claim to be segments to be cut.
import random
import socket
import struct
import sys

SOL_PACKET, PACKET_VNET_HDR = 263, 15
ALL = 0x0003
KINDS = [0x0800, 0x86DD, 0x0806, 0x8100, 0x88A8, 0x8808, 0x88CC, 0x8864, 0x0000, 0x05DC, 0xFFFF]
NEIGHBOUR = bytes.fromhex(sys.argv[1].replace(":", ""))
GROUPS = ["ffffffffffff", "0180c2000000", "0180c2000001", "01005e000001", "333300000001"]
PLACES = [NEIGHBOUR, NEIGHBOUR] + [bytes.fromhex(group) for group in GROUPS]
random.seed(4)


def packet(header):
    one = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ALL))
    if header:
        one.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    one.bind(("eth0", 0))
    return one


def ip_header(length):
    # Right in what routers look at first, so that more of the way is gone, and wrong behind that.
    return struct.pack(
        "!BBHHHBBH4s4s",
        random.choice([0x45, 0x45, 0x4F, 0x41]),
        0,
        random.choice([length - 14, 65535, 0, 20]),
        random.randrange(65536),
        random.choice([0, 0x2000, 0x1FFF, 0x4000]),
        64,
        random.choice([1, 6, 17, 132, 255]),
        0,
        random.randbytes(4),
        random.randbytes(4),
    )


def frame(length):
    source = random.choice([NEIGHBOUR, random.randbytes(6), bytes(6), b"\xff" * 6])
    kind = random.choice(KINDS)
    start = random.choice(PLACES) + source + struct.pack("!H", kind)
    if kind == 0x0800:
        start += ip_header(length)
    return (start + random.randbytes(length))[:length]


def unfinished():
    flags, kind = random.randrange(4), random.choice([0, 1, 3, 4, 5, 0x81, 255])
    numbers = [random.choice([0, 1, 14, 34, 54, 1400, 65535, random.randrange(65536)]) for _ in range(4)]
    return struct.pack("<BBHHHH", flags, kind, *numbers)


plain, headed = packet(False), packet(True)
taken = 0
for number in range(int(sys.argv[2])):
    try:
        if number % 2:
            plain.send(frame(random.choice([14, 15, 20, 34, 60, 1514, random.randrange(14, 1514)])))
        else:
            headed.send(unfinished() + frame(random.choice([60, 1514, 9000, 65000, 65549])))
        taken += 1
    except OSError:
        pass
print(taken)
