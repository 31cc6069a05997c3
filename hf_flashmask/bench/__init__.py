"""Measurements that users can repeat: what the README says comes from here."""
