# SPDX-License-Identifier: Apache-2.0
"""How the linear layers of each host hold their weight: one file a source, none of which imports its host."""
