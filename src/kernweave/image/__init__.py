# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernel memory to tables: symbols, text, patchable sites, denylist."""
