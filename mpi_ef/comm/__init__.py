"""The interface of communicators, and agreement between ranks."""
