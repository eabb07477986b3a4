# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel side: its interface, a client over a byte stream, a verified fake, C sources."""
