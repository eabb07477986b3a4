# SPDX-License-Identifier: GPL-2.0-or-later
"""Others who change the text or take a function while it is counted."""
