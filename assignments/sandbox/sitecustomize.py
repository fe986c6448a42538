"""Python imports this by itself at its start, since grade.py puts this folder on PYTHONPATH: no network, and no file beyond 256 MB.

NOTE: it stops Python code that opens a connection, which is what a library does that wants to download. It does not stop a program in another
language, nor code that means to get out: for that, run grade.py in a container without a network.
"""
import socket


def _refuse(*_, **__):
    raise OSError("there is no network while an assignment is graded.")


socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = _refuse
try:
    import resource
    # ours: 256 MB a file. The tests write a few kB; a loop that writes for ever ends here and not with a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**28, 2**28))
except ImportError: pass        # Windows has no such limits
