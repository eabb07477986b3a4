# SPDX-License-Identifier: GPL-2.0-or-later
"""Values that pass between the stages: points, tables, plans."""
