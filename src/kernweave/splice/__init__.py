# SPDX-License-Identifier: GPL-2.0-or-later
"""Points and tables to a plan: tactics and trampolines."""
