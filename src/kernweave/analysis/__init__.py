# SPDX-License-Identifier: GPL-2.0-or-later
"""Tables to tables: instructions, blocks, liveness."""
