"""A worker's task, in a file of its own: each new worker of test_tools_data.py would import all that that one does."""

import os
import time


def harmful(item):
    """Some items hang, kill the process or are refused."""
    if item == 5:
        time.sleep(60)
    if item == 9:
        os._exit(7)
    return item * item
