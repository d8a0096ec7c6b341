"""Questions that many estimates answer: what fits, what to switch on, how two runs differ."""
