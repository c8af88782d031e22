# Opens connections to a port and drops them, some after a word: connect.py HOST PORT COUNT
import socket
import sys

host, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
for number in range(count):
    one = socket.create_connection((host, port), timeout=60)
    if number % 2:
        one.sendall(b"hello\n")
    one.close()
print("dropped", count)
