# Answers in capitals: every line of a connection, and every datagram, on each port that an argument names.
import selectors
import socket
import sys

sockets = selectors.DefaultSelector()
for port in map(int, sys.argv[1:]):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        one = socket.socket(socket.AF_INET6, kind)
        one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind(("::", port))
        if kind == socket.SOCK_STREAM:
            one.listen(1024)
        sockets.register(one, selectors.EVENT_READ, kind)
print("ready", flush=True)

while True:
    for key, _ in sockets.select():
        one = key.fileobj
        try:
            if key.data == socket.SOCK_DGRAM:
                text, peer = one.recvfrom(2000)
                one.sendto(text.upper(), peer)
            elif key.data == socket.SOCK_STREAM:
                sockets.register(one.accept()[0], selectors.EVENT_READ, None)
            else:
                text = one.recv(2000)
                if not text:
                    raise ConnectionError
                one.sendall(text.upper())
        except OSError:
            if key.data is None:
                sockets.unregister(one)
                one.close()
