# SPDX-License-Identifier: Apache-2.0
"""The layers that a merged model is made of, the kinds of linears, and the fold of alpha into a bias."""
