"""Attention masks as expressions: which query attends which key."""
