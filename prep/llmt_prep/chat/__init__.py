"""Chats and preference pairs: records to messages, messages to one text, and which of its characters are targets."""
