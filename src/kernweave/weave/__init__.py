# SPDX-License-Identifier: GPL-2.0-or-later
"""Weave: functions rewritten with counters between their instructions, by columns."""
