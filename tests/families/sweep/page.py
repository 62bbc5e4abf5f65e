BAD = ("differs", "crashes", "not done", "falls back in silence")
