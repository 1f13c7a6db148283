# SPDX-License-Identifier: Apache-2.0
"""Text as windows of token ids, for whoever calibrates, trains or evaluates: what `calibration.text` has for them."""

from spon_plugin.calibration.text import leading_windows, mixed_windows, offline_text, read_text, spread_windows

__all__ = ["leading_windows", "mixed_windows", "offline_text", "read_text", "spread_windows"]
