# SPDX-License-Identifier: GPL-2.0-or-later
"""Machine code: bytes to columns, encoding, relocation, built-in snippets."""
