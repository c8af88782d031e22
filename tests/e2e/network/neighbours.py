# Fills tables of neighbours: this kernel's with addresses that nobody has, and the gateway's with ones that it is
# asked from: neighbours.py GATEWAY COUNT. Prints the most that the table here held.
import socket
import struct
import sys

gateway, count = socket.inet_aton(sys.argv[1]), int(sys.argv[2])
mine = open("/sys/class/net/eth0/address").read().strip()
mine = bytes.fromhex(mine.replace(":", ""))


def other(number):
    # Above those that the engine gives away.
    return gateway[:2] + struct.pack("!H", 0x8000 + number)


frames = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0806))
frames.bind(("eth0", 0))
# Quickly, because the kernel gives up the first ones after three seconds; and from a socket each, because what waits
# for an answer counts as sent by its socket, which may not send much.
held = 0
for number in range(count):
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
            one.sendto(b"x", (socket.inet_ntoa(other(number)), 9))
    except OSError:
        # The table is full.
        pass
    # The kernel clears it up when it likes.
    if number % 10 == 0:
        held = max(held, len(open("/proc/net/arp").readlines()) - 1)
for number in range(count):
    hardware = b"\x02\x00\x00\x00" + struct.pack("!H", number)
    who_has = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + hardware + other(number) + bytes(6) + gateway
    frames.send(b"\xff" * 6 + mine + struct.pack("!H", 0x0806) + who_has)
print(held)
