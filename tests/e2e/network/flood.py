# Sends datagrams to an address as fast as it can, for a number of seconds: flood.py HOST SECONDS
import socket
import sys
import time

one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
one.setblocking(False)
place, text = (sys.argv[1], 9), bytes(1400)
sent, end = 0, time.monotonic() + float(sys.argv[2])
while time.monotonic() < end:
    try:
        one.sendto(text, place)
        sent += 1
    except OSError:
        # The queue is full, or the far side has refused.
        pass
print(sent)
