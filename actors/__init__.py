"""Thin, typed Ray actors around the classes of onpolicy_skd, which do the computation."""
