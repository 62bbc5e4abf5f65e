"""flash-attn's functions, through fastattn: for code that is written against them.

`dense` has `flash_attn_func`, `varlen` has `flash_attn_varlen_func`, `kvcache` has `flash_attn_with_kvcache`. All three
bring their arguments into one form (`arguments`), make ALiBi's mask (`alibi`) and call the op (`attend`).
"""
