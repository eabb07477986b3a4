# SPDX-License-Identifier: GPL-2.0-or-later
"""The correctness oracle: a QEMU plug-in that counts and audits, and the judges of its data."""
