"""A pytest plugin that says before each test what it has to find.

DORM_BEFORE, if it is there, is the command that is run before each test, once it has succeeded: for a session whose VM is
asleep, or on its way there. DORM_PAUSE is the longest pause after it, in seconds, of which each test gets another share.
"""

import os
import random
import shlex
import subprocess
import time
import warnings

import pytest

TRIES = 300
SHARES = random.Random(1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if "DORM_BEFORE" not in os.environ:
        return
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


@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_runtest_call(item):
    # The suite makes an error of each warning, but only for whichever test comes first: pytest itself takes that back. So the
    # first of some that are picked would fail for a connection that it leaves to be collected, as many of them do.
    warnings.resetwarnings()
    yield
