"""All that is known of transformers, accelerate and PEFT beyond their public API; nothing else of it stands elsewhere.

Arguments are read by role instead of by name, and what is relied on is checked at apply (`contract`), so that a release
which changes it is refused with what was expected and found, never served wrongly.
"""
