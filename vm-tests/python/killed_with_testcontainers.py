"""A user of testcontainers that is killed while a container of its own runs."""

import os
import signal

from testcontainers.core.container import DockerContainer

DockerContainer("busybox").with_command("sleep 1000").with_name("orphan").start()
print("started", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
