# SPDX-License-Identifier: GPL-2.0-or-later
"""Everything the analysis calls dead is overwritten in a running kernel, and nobody notices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import kernweave
from kernweave.lab.machine import Lab
from kernweave.session.attach import Clobber, overwrite_dead
from kernweave.session.attachment import Attachment
from kernweave.session.session import Session
from stress_ng import stress_ng

#: every part of the kernel that a mixed load runs through
GLOBS = (
    "vfs_*", "do_*", "__do_*", "ksys_*", "path_*", "d_*", "lookup_*", "link_*", "may_*",
    "pipe_*", "anon_pipe_*", "sock_*", "unix_*", "skb_*", "__skb_*", "tcp_*", "ip_*", "inet_*",
    "netif_*", "futex_*", "sched_*", "try_*", "wake_*", "*_fair", "*_rq", "*_task", "hrtimer_*",
    "tick_*", "timer_*", "*timer*", "signal_*", "*signal*", "exit_*", "copy_*", "dup_*", "mm_*",
    "handle_*", "*_page*", "*folio*", "filemap_*", "shmem_*", "kmem_*", "*slab*", "vm*", "*vma*",
    "mmap_*", "unmap_*", "ovl_*", "9p:*", "9pnet:*", "overlay:*", "virtio_ring:*",
    "*pid*", "*cred*", "poll_*",
    "ep_*", "sem*", "shm_*", "*msg*", "load_*", "elf_*", "rcu_*", "*work*", "*queue*", "*inode*",
    "*dentry*", "*file*", "*mount*", "radix_*", "xa*", "mas_*", "rb_*", "*list*", "*lock*",
)  # fmt: skip
ENOUGH = 20_000
TACTICS = ("nop5", "jmp32", "group", "springboard")


@contextmanager
def poisoned(
    session: Session, globs: tuple[str, ...] = GLOBS, clobber: Clobber = overwrite_dead
) -> Iterator[Attachment]:
    """Overwrite what is dead at every block start that a jump fits."""
    points = [f"{glob}@blocks" for glob in globs]
    with session.splice(*points, tactics=TACTICS, partial=True, clobber=clobber) as attachment:
        yield attachment


def load(session: Session, seconds: int) -> None:
    """Run stress-ng; every stressor's own verification must succeed."""
    argv, env = stress_ng(seconds)
    done = session.run(argv, env=env, cwd="/", capture=True, limit_s=4 * seconds + 400)
    text = (done.stdout + done.stderr).decode(errors="replace")
    assert done.exit == 0, text
    assert "successful run completed" in text, text


def check_poisoned_kernel(machine: Lab, seconds: int, globs: tuple[str, ...] = GLOBS) -> int:
    """Load a poisoned kernel for so long; return how many points were poisoned."""
    with kernweave.connect(f"lab:{machine.name}", progress=print) as session:
        with poisoned(session, globs) as attachment:
            count = len(attachment.placed)
            print(f"{count:,} block starts poisoned")
            load(session, seconds)
        hits = attachment.hits()
        print(f"{int((hits > 0).sum()):,} of them hit, {int(hits.sum()):,} times")
        assert attachment.text_restored
    return count
