"""A pytest plugin that says before each test what it has to find: a session whose VM is asleep, or on its way there.

DORM_BEFORE is the command that is run before each test, once it has succeeded; DORM_PAUSE the longest pause after it, in
seconds, of which each test gets another share.
"""

import os
import random
import shlex
import subprocess
import time

import pytest

TRIES = 300
SHARES = random.Random(1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    command = shlex.split(os.environ["DORM_BEFORE"])
    for _ in range(TRIES):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            break
        # What the last test held ends a moment after it.
        time.sleep(0.1)
    else:
        pytest.exit(f"{command} fails: {done.stderr}", returncode=3)
    time.sleep(SHARES.uniform(0, float(os.environ.get("DORM_PAUSE", "0"))))
