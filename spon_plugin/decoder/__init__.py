# SPDX-License-Identifier: Apache-2.0
"""What a decoder is made of: its input sites, its tokens' positions, its output head."""
