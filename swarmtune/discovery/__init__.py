"""Announcements: signed, expiring records of who serves which blocks. The DHT is a hint; the client verifies each server itself."""
