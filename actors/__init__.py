"""Thin typed Ray actors around the classes of onpolicy_skd, where the mathematics is."""
