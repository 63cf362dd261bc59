"""Calls to the system that fail, in a server's processes: Python loads this at its start.

While the folder that HF_PAGED_FAULTS names has a file called `open`, `bind`, `spawn`, `fork` or `send`, every second
such call of these processes raises.
"""

import asyncio
import builtins
import errno
import functools
import os
import random
import socket
import subprocess

FOLDER = os.environ["HF_PAGED_FAULTS"]
_stat = os.stat


def failing(name, call, error):
    """A call that may fail."""

    @functools.wraps(call)
    def attempt(*arguments, **options):
        try:
            _stat(f"{FOLDER}/{name}")
        except OSError:
            return call(*arguments, **options)
        if random.random() < 0.5:
            raise error(f"injected: {name}")
        return call(*arguments, **options)

    return attempt


def system_error(number):
    return lambda message: OSError(number, f"{os.strerror(number)} ({message})")


builtins.open = failing("open", open, system_error(errno.EMFILE))
os.open = failing("open", os.open, system_error(errno.ENOSPC))
os.mkdir = failing("open", os.mkdir, system_error(errno.ENOSPC))
os.fork = failing("fork", os.fork, system_error(errno.ENOMEM))
socket.socket.bind = failing("bind", socket.socket.bind, system_error(errno.EADDRNOTAVAIL))
subprocess.Popen.__init__ = failing("spawn", subprocess.Popen.__init__, system_error(errno.EAGAIN))
asyncio.create_subprocess_exec = failing("spawn", asyncio.create_subprocess_exec, system_error(errno.EAGAIN))
try:
    import zmq
except ImportError:
    pass
else:
    zmq.Socket.bind = failing("bind", zmq.Socket.bind, lambda message: zmq.ZMQError(errno.ENOSPC, message))
    zmq.Socket.send = failing("send", zmq.Socket.send, lambda message: zmq.ZMQError(errno.ENOMEM, message))
