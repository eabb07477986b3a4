# SPDX-License-Identifier: GPL-2.0-or-later
"""What all tests share."""

import pytest

pytest.register_assert_rewrite("contract", "command")
