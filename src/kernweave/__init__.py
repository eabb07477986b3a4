# SPDX-License-Identifier: GPL-2.0-or-later
"""Count, trace and change any instruction of a running Linux kernel, from Python."""
