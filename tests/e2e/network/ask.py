# Asks a port for an answer in capitals and prints it: ask.py tcp|udp HOST PORT
import socket
import sys

kind, host, port = sys.argv[1:]
stream = kind == "tcp"
(family, _, _, _, address) = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
# A datagram may be lost.
for attempt in range(30):
    one = socket.socket(family, socket.SOCK_STREAM if stream else socket.SOCK_DGRAM)
    one.settimeout(60 if stream else 2)
    try:
        one.connect(address)
        one.sendall(b"hello\n")
        print(one.recv(100).decode().strip())
        break
    except OSError as error:
        if stream:
            raise
