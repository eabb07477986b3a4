# SPDX-License-Identifier: GPL-2.0-or-later
"""A connection to a kernel: attach, detach, run, read counts."""
