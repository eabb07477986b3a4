# SPDX-License-Identifier: GPL-2.0-or-later
"""How every driver's sessions begin: the fake's and the real one's."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from contract_sessions import PAGE, Sessions, ask, hello, refusal
from kernweave.driver import uapi
from kernweave.driver.uapi import Op
from kernweave.errors import DriverError


class HelloContract:
    """Who may talk, in which language, and who may write."""

    def test_hello_once_tells_facts(self, sessions: Sessions) -> None:
        facts = sessions.driver(writer=False).facts
        assert facts.text_start < facts.text_end
        assert facts.cpus >= 1
        assert facts.release and facts.version

    def test_hello_twice_is_refused(self, sessions: Sessions) -> None:
        session = sessions.raw()
        assert ask(session, Op.HELLO, hello()).status == 0
        assert ask(session, Op.HELLO, hello()).status == -errno.EINVAL

    def test_hello_unknown_flag_is_refused(self, sessions: Sessions) -> None:
        session = sessions.raw()
        assert ask(session, Op.HELLO, hello(2)).status == -errno.EINVAL
        assert ask(session, Op.HELLO, hello()).status == 0

    def test_hello_too_short_is_refused(self, sessions: Sessions) -> None:
        assert ask(sessions.raw(), Op.HELLO, hello()[:-1]).status == -errno.EINVAL

    def test_request_before_hello_is_refused(self, sessions: Sessions) -> None:
        assert ask(sessions.raw(), Op.PLACED).status == -errno.ENOTCONN

    @pytest.mark.parametrize("version", [0, uapi.VERSION + 1])
    def test_request_of_wrong_version_names_the_drivers(
        self, sessions: Sessions, version: int
    ) -> None:
        reply = ask(sessions.raw(), Op.HELLO, hello(), version=version)
        assert (reply.status, reply.version) == (-errno.EPROTO, uapi.VERSION)

    @pytest.mark.parametrize("op", [0, max(Op) + 1, 0xFFFF])
    def test_request_unknown_is_refused(self, sessions: Sessions, op: int) -> None:
        session = sessions.raw()
        ask(session, Op.HELLO, hello())
        assert ask(session, op).status == -errno.EOPNOTSUPP

    @pytest.mark.parametrize("at", [0, 8])
    def test_request_with_wrong_frame_fails(self, sessions: Sessions, at: int) -> None:
        head = np.zeros(1, uapi.REQ)
        head["magic"], head["version"], head["op"] = uapi.MAGIC, uapi.VERSION, Op.PLACED
        broken = bytearray(head.tobytes())
        broken[at] ^= 1  # the magic, the length
        with pytest.raises(DriverError) as error:
            sessions.raw().call(bytes(broken))
        assert refusal(error) == "EBADMSG"

    def test_reader_writing_is_refused(self, sessions: Sessions) -> None:
        reader = sessions.driver(writer=False)
        with pytest.raises(DriverError) as error:
            reader.area(PAGE)
        assert refusal(error) == "EPERM"
        with pytest.raises(DriverError) as error:
            reader.quiesce()
        assert refusal(error) == "EPERM"

    def test_writer_second_is_told_who_writes(self, sessions: Sessions) -> None:
        sessions.driver()
        with pytest.raises(DriverError) as error:
            sessions.driver()
        assert refusal(error) == "EBUSY"
        program = Path(sys.argv[0]).name[:31]
        assert f"pid {os.getpid()} ({program})" in error.value.message

    def test_writer_refused_may_still_read(self, sessions: Sessions) -> None:
        sessions.driver()
        second = sessions.raw()
        assert ask(second, Op.HELLO, hello(uapi.WRITER)).status == -errno.EBUSY
        assert ask(second, Op.HELLO, hello()).status == 0

    def test_writer_gone_leaves_its_place(self, sessions: Sessions) -> None:
        sessions.driver()
        sessions.close_last()
        assert sessions.driver().area(PAGE).size == PAGE
