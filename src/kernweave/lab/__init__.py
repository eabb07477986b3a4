# SPDX-License-Identifier: GPL-2.0-or-later
"""The lab: a throw-away QEMU machine with a stock Debian kernel."""
