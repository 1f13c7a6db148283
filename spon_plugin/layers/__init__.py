# SPDX-License-Identifier: Apache-2.0
"""The layers that a merged model is made of."""
