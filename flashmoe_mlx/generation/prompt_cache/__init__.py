"""Prompt cache: prompts continue from the states that earlier sequences left behind.

``cache`` resumes and keeps sequences, ``tree`` holds conversations, ``eviction`` limits it, and ``positions`` decides
where states are kept.
"""
