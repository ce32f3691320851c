from __future__ import annotations

import subprocess
import sys

import pytest
import torch.distributed as dist

ENDINGS = """
import torch, torch.distributed as dist
from vla_energy.contact import Contact

class Begun:
    def wait(self):
        pass  # the group's threads are still at it when the group ends, as happens by chance to a training

def begin(contact):
    sent = torch.ones(3)
    def start():
        dist.all_reduce(sent, async_op=True)
        return Begun()
    contact.finish(start, [sent], patient=False)

for _ in range(30):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for _ in range(4):
        begin(Contact(0, 2))
    dist.destroy_process_group()
print("ended")
"""


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
def test_the_end_of_a_group_waits_for_no_tensor_that_python_has_dropped() -> None:
    # A process of its own: one that hangs here hangs with the interpreter's lock, and cannot be interrupted.
    done = subprocess.run([sys.executable, "-c", ENDINGS], capture_output=True, text=True, timeout=60)
    assert done.stdout == "ended\n", done.stderr
