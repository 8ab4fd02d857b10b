"""Batch templates, as package data."""
